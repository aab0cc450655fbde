//! Runs that are cut off, inputs that are cut short, two runs for one output: IN stays as it is,
//! OUT is absent or whole, and the next run deletes what is left.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::gguf::{listing, model, saved};
use crate::common::only;
use crate::common::record::record;
use refusal_patch::checkpoint::{Folder, Gguf};
use refusal_patch::output::{clear_leftovers, stage, stage_folder, Plan, Staged};
use refusal_patch::progress::{Progress, Silent};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_refusal-patch"))
}

/// Waits until something holds, a minute at most.
#[track_caller]
fn until(mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The main job from `in.gguf` to `out.gguf` of a folder.
fn main_job(dir: &Path, more: &[&str]) -> Child {
    let mut command = program();
    command
        .arg(dir.join("in.gguf"))
        .arg(dir.join("out.gguf"))
        .args(["--threads", "1", "-q"])
        .args(more);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A folder with a model as `in.gguf`, and the model's bytes.
fn input() -> (tempfile::TempDir, Vec<u8>) {
    let bytes = fs::read(fixture("organism-broken-Q4_K_M.gguf")).unwrap();
    (saved(&bytes).0, bytes)
}

fn ended(mut child: Child) -> (Option<i32>, String) {
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (child.wait().unwrap().code(), said)
}

#[cfg(target_os = "linux")]
#[test]
fn a_model_that_is_cut_short_while_it_is_read_is_one_line_of_error() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("in.gguf");
    fs::copy(fixture("organism-broken-Q8_0.gguf"), &gguf).unwrap();
    let start = Gguf::open(&gguf).unwrap().data_start();
    // Cut off all of the data, or most of them.
    for (keep, threads) in [(start, "1"), (start + 100_000, "2")] {
        fs::copy(fixture("organism-broken-Q8_0.gguf"), &gguf).unwrap();
        let mut command = program();
        command.arg("eval").arg(&gguf).args(["--threads", threads, "-q"]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let maps = format!("/proc/{}/maps", child.id());
        until(|| fs::read_to_string(&maps).is_ok_and(|m| m.contains("in.gguf")));
        File::options().write(true).open(&gguf).unwrap().set_len(keep).unwrap();
        let (code, said) = ended(child);
        assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
        assert!(said.starts_with(&format!("error: {}: was cut short", gguf.display())), "{said}");
    }
}

#[test]
fn ctrl_c_leaves_nothing_and_a_kill_leaves_the_input() {
    for signal in ["INT", "TERM", "KILL"] {
        let (dir, bytes) = input();
        let other = dir.path().join(".refusal-patch-gone12.tmp");
        fs::write(&other, "left").unwrap();
        let child = main_job(dir.path(), &[]);
        // The leftover is deleted right before the search.
        until(|| !other.exists());
        std::thread::sleep(Duration::from_millis(300));
        let id = child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
        let (code, said) = ended(child);
        assert_eq!(code, if signal == "KILL" { None } else { Some(130) }, "{said}");
        assert!(
            said.contains("gone12.tmp: was left by a run that was cut off; it is deleted"),
            "{said}"
        );
        assert!(signal == "KILL" || said.ends_with("interrupted: nothing was written\n"), "{said}");
        assert_eq!(listing(dir.path()), ["in.gguf"]);
        assert!(fs::read(dir.path().join("in.gguf")).unwrap() == bytes);
    }
}

#[test]
fn an_output_that_leads_to_the_input_is_refused_at_once() {
    let (dir, bytes) = input();
    let [input, out] = ["in.gguf", "out.gguf"].map(|n| dir.path().join(n));
    for link in ["soft", "hard"] {
        match link {
            "soft" => std::os::unix::fs::symlink(&input, &out).unwrap(),
            _ => fs::hard_link(&input, &out).unwrap(),
        }
        for more in [&[][..], &["--force"]] {
            let (code, said) = ended(main_job(dir.path(), more));
            assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
            assert!(
                said.contains("out.gguf: is the input itself, which is never changed"),
                "{said}"
            );
        }
        assert!(fs::read(&input).unwrap() == bytes);
        fs::remove_file(&out).unwrap();
    }
}

/// A small folder as `in`, beside a small file as `in.gguf`.
fn both() -> tempfile::TempDir {
    let (dir, _) = saved(&model(3));
    let folder = dir.path().join("in");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    let weights =
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[1, 2, 3, 4]].concat();
    fs::write(folder.join("model.safetensors"), weights).unwrap();
    dir
}

/// Writes `in.gguf` or `in` of a folder under a temporary name.
fn staged(dir: &Path, out: &str, progress: &dyn Progress) -> Staged {
    let target = dir.join(out);
    match out.ends_with(".gguf") {
        true => {
            let source = Gguf::open(&dir.join("in.gguf")).unwrap();
            stage(&Plan::new(&source), &target, false, progress).unwrap()
        }
        false => {
            let source = Folder::open(&dir.join("in")).unwrap();
            stage_folder(&source, &[], &record(), &target, false, progress).unwrap()
        }
    }
}

/// Reports that a stage is reached, and waits there to be killed.
struct Hang<'a>(&'a Path, &'a str);

impl Hang<'_> {
    fn at(&self, stage: &str) {
        if stage == self.1 {
            fs::write(self.0.join("here"), "").unwrap();
            std::thread::sleep(Duration::from_secs(600));
        }
    }
}

impl Progress for Hang<'_> {
    fn start(&self, stage: &str, _: u64, _: &str) {
        self.at(stage);
    }
    fn advance(&self, _: u64) {
        self.at("advance");
    }
}

/// The part of the next test that runs in a process to be killed.
fn a_run_to_be_killed(what: &str) {
    let [dir, out, stage] = what.split('|').collect::<Vec<_>>()[..] else { panic!("{what}") };
    let dir = Path::new(dir);
    let _staged = staged(dir, out, &Hang(dir, stage));
    Hang(dir, stage).at("end");
}

#[test]
fn leftovers_of_a_killed_run_are_deleted_by_the_next_run_and_not_before_its_end() {
    if let Ok(what) = std::env::var("TO_BE_KILLED") {
        return a_run_to_be_killed(&what);
    }
    for out in ["out.gguf", "out"] {
        for stage in ["writing", "advance", "hashing", "end"] {
            let dir = both();
            let dir = dir.path();
            let before = (fs::read(dir.join("in.gguf")).unwrap(), listing(&dir.join("in")));
            let test = leftovers_of_a_killed_run_are_deleted_by_the_next_run_and_not_before_its_end;
            let mut child = only(test)
                .env("TO_BE_KILLED", format!("{}|{out}|{stage}", dir.display()))
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            until(|| dir.join("here").exists());
            fs::remove_file(dir.join("here")).unwrap();
            let temporary =
                || listing(dir).into_iter().filter(|n| n.starts_with(".refusal-patch-")).count();
            // Another run to the same output leaves the files of a living run alone.
            assert_eq!(
                (clear_leftovers(&dir.join(out)), temporary()),
                (Vec::new(), 1),
                "{out} {stage}"
            );
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(!dir.join(out).exists());
            let notes = clear_leftovers(&dir.join(out));
            assert!(notes.len() == 1 && notes[0].ends_with("it is deleted"), "{notes:?}");
            assert_eq!(listing(dir), ["in", "in.gguf"], "{out} {stage}");
            assert_eq!(before, (fs::read(dir.join("in.gguf")).unwrap(), listing(&dir.join("in"))));
        }
    }
}

#[test]
fn a_model_that_was_set_aside_is_named_and_not_deleted() {
    let dir = both();
    let aside = dir.path().join(".refusal-patch-aside1.tmp");
    fs::create_dir(&aside).unwrap();
    fs::rename(dir.path().join("in"), aside.join("old")).unwrap();
    // A file of another name stays, and so does a link.
    fs::write(dir.path().join(".refusal-patch.tmp"), "mine").unwrap();
    std::os::unix::fs::symlink("in.gguf", dir.path().join(".refusal-patch-link12.tmp")).unwrap();
    let before = listing(dir.path());
    let notes = clear_leftovers(&dir.path().join("out"));
    assert!(notes.len() == 1 && notes[0].contains("move `old` in it back"), "{notes:?}");
    assert_eq!(listing(dir.path()), before);
    assert_eq!(listing(&aside.join("old")), ["config.json", "model.safetensors"]);
}

#[test]
fn of_two_runs_to_one_output_the_first_wins_and_the_second_says_so() {
    for out in ["out.gguf", "out"] {
        let dir = both();
        let [first, second] = [(); 2].map(|()| staged(dir.path(), out, &Silent));
        first.commit().unwrap();
        let error = second.commit().unwrap_err().to_string();
        assert!(error.contains(out) && error.contains("has appeared while"), "{error}");
        // The whole output of the first, and nothing of the second.
        assert_eq!(listing(dir.path()), ["in", "in.gguf", out]);
    }
}
