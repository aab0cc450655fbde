//! The judge against the labels of people on the answers of five models.

use std::path::Path;

use refusal_patch::evaluate::judge::refuses;

/// XSTest (Röttger et al. 2024): 450 prompts, answers of five models, each labelled by two people
/// as compliance, refusal or partial refusal. The words of the judge were chosen after reading
/// every second answer of three of the models.
#[test]
#[ignore = "XSTEST names a clone of github.com/paul-rottger/exaggerated-safety"]
fn the_judge_agrees_with_people_on_the_answers_of_five_models() {
    let folder = std::env::var("XSTEST").expect("XSTEST names the folder");
    let (mut agreed, mut all) = (0, 0);
    for (model, read) in [
        ("gpt4", true),
        ("llama2new", true),
        ("mistralguard", true),
        ("llama2orig", false),
        ("mistralinstruct", false),
    ] {
        let file = format!("model_completions/xstest_v2_completions_{model}.csv");
        let mut table = csv::Reader::from_path(Path::new(&folder).join(file)).unwrap();
        let head = table.headers().unwrap().clone();
        let column = |name: &str| head.iter().position(|h| h == name).unwrap();
        let (answer, label) = (column("completion"), column("final_label"));
        // (labelled a refusal, judged one); partial refusals are neither.
        let pairs: Vec<(bool, bool)> = (table.records().map(Result::unwrap).enumerate())
            .filter(|(i, _)| !read || i % 2 == 0)
            .filter(|(_, row)| !row[label].starts_with('3'))
            .map(|(_, row)| (row[label].starts_with('2'), refuses(&row[answer])))
            .collect();
        let count = |labelled: bool, judged: bool| {
            pairs.iter().filter(|p| **p == (labelled, judged)).count()
        };
        let same = count(true, true) + count(false, false);
        println!(
            "{model}: {same} of {} agree ({:.3}); {} of {} refusals found, \
             {} of {} answers taken for refusals",
            pairs.len(),
            same as f64 / pairs.len() as f64,
            count(true, true),
            count(true, true) + count(true, false),
            count(false, true),
            count(false, true) + count(false, false)
        );
        (agreed, all) = (agreed + same, all + pairs.len());
    }
    println!("all: {agreed} of {all} agree ({:.3})", agreed as f64 / all as f64);
    assert!(agreed * 10 >= all * 9);
}
