//! Recognizes one part of a file that was cut into pieces for upload. Publishers of large models
//! name such parts `MODEL.gguf.part1of2`, `MODEL.gguf-split-a` or `MODEL.gguf.001`. Concatenated in
//! order, the parts give the file.

use std::path::Path;

/// How the names of whole files end.
const WHOLE: [&str; 2] = [".gguf", ".safetensors"];

/// The name of the whole file, if `name` is that of a part.
fn part_of(name: &str) -> Option<&str> {
    let lower = name.to_ascii_lowercase();
    let end = WHOLE.iter().filter_map(|w| lower.rfind(w).map(|at| at + w.len())).max()?;
    let whole = name.get(..end)?;
    let suffix = lower[end..].trim_start_matches(['.', '-', '_']);
    let numbered = |word: &str| {
        let rest = suffix.strip_prefix(word).map(|r| r.trim_start_matches(['.', '-', '_']));
        rest.is_some_and(|r| {
            r.len() == 1 || r.starts_with(|c: char| c.is_ascii_digit()) || is_letter_count(r)
        })
    };
    let counted =
        !suffix.is_empty() && suffix.bytes().all(|b| b.is_ascii_digit()) || is_letter_count(suffix);
    (counted || ["part", "split", "chunk"].into_iter().any(numbered)).then_some(whole)
}

/// Whether a suffix counts in letters: `a`, `b` …, or `aa`, `ab` … as the tool `split` writes.
fn is_letter_count(suffix: &str) -> bool {
    matches!(suffix.as_bytes(), [b'a'..=b'z'] | [b'a', b'a'..=b'z'])
}

/// The error for an unreadable file whose name is that of a part: what the file is, and how to join
/// the parts. `None` for other names.
pub(super) fn advice(path: &Path) -> Option<(String, String)> {
    let name = path.file_name()?.to_str()?;
    let whole = part_of(name)?;
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|e| e.file_name().into_string().ok());
    let mut parts: Vec<String> = names.filter(|n| part_of(n) == Some(whole)).collect();
    // By length first, so that 10 comes after 9.
    parts.sort_by(|a, b| a.len().cmp(&b.len()).then(a.cmp(b)));
    let what = format!(
        "{}: by its name it is a part of {whole}, which was cut into parts for upload",
        path.display()
    );
    let list = match parts.len() {
        0 | 1 => "FIRST-PART SECOND-PART ...".to_string(),
        _ => parts.join(" "),
    };
    Some((what, format!("download all parts and join them in order: cat {list} > {whole}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_known_by_its_name() {
        for (name, whole) in [
            ("m.Q4_K_M.gguf.part1of2", "m.Q4_K_M.gguf"),
            ("m.gguf-split-a", "m.gguf"),
            ("m.gguf-part-b", "m.gguf"),
            ("m.gguf.001", "m.gguf"),
            ("m.gguf.aa", "m.gguf"),
            ("M.GGUF.Part-2-of-3", "M.GGUF"),
            ("model.safetensors.part02", "model.safetensors"),
        ] {
            assert_eq!(part_of(name), Some(whole), "{name}");
        }
        for name in [
            "m.gguf",
            "m-00001-of-00002.gguf",
            "m.gguf.gz",
            "m.gguf.bak",
            "m.gguf.partial",
            "m.gguf.split",
            "part1of2",
        ] {
            assert_eq!(part_of(name), None, "{name}");
        }
    }

    #[test]
    fn all_parts_are_joined_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        for n in [10, 2, 1] {
            std::fs::write(dir.path().join(format!("m.gguf.part{n}of10")), b"x").unwrap();
        }
        std::fs::write(dir.path().join("other.gguf.part1of2"), b"x").unwrap();
        let (what, hint) = advice(&dir.path().join("m.gguf.part2of10")).unwrap();
        assert!(what.contains("m.gguf.part2of10: by its name it is a part of m.gguf"), "{what}");
        assert!(
            hint.ends_with("cat m.gguf.part1of10 m.gguf.part2of10 m.gguf.part10of10 > m.gguf"),
            "{hint}"
        );
        let (_, hint) = advice(&dir.path().join("other.gguf.part1of2")).unwrap();
        assert!(hint.contains("cat FIRST-PART SECOND-PART ... > other.gguf"), "{hint}");
    }
}
