//! What docs/SECURITY.md says about the source: where unsafe code is, and that nothing speaks to a
//! network.

use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every source file of the program.
fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn texts() -> Vec<(String, String)> {
    let mut paths = Vec::new();
    sources(&root().join("src"), &mut paths);
    paths.sort();
    let name = |p: &Path| p.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
    paths.iter().map(|p| (name(p), std::fs::read_to_string(p).unwrap())).collect()
}

#[test]
fn unsafe_code_is_where_the_list_says() {
    let is_unsafe = |line: &str| {
        let code = line.split("//").next().unwrap();
        code.contains("unsafe ") || code.contains("unsafe{")
    };
    let found: Vec<String> = texts()
        .into_iter()
        .filter(|(_, text)| text.lines().any(is_unsafe))
        .map(|(name, _)| name)
        .collect();
    let security = std::fs::read_to_string(root().join("docs/SECURITY.md")).unwrap();
    let mut listed: Vec<String> = security
        .lines()
        .filter_map(|l| l.strip_prefix("| `src/")?.split_once('`').map(|(f, _)| format!("src/{f}")))
        .collect();
    listed.sort();
    assert!(found.len() > 2);
    assert_eq!(found, listed);
}

#[test]
fn nothing_speaks_to_a_network() {
    for (name, text) in texts() {
        for word in ["std::net", "TcpStream", "UdpSocket", "UnixStream"] {
            assert!(!text.contains(word), "{name} names {word}");
        }
    }
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let crates =
        ["hyper", "reqwest", "ureq", "curl", "hf-hub", "tokio", "socket2", "mio", "rustls"];
    for name in crates.into_iter().chain(["native-tls", "openssl", "h2", "quinn", "isahc"]) {
        assert!(!lock.contains(&format!("name = \"{name}\"\n")), "{name} is a dependency");
    }
}
