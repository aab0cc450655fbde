//! A full disk. The tests mount a small file system; they are skipped where that is not allowed (it
//! needs root on Linux).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::gguf::*;
use refusal_patch::checkpoint::Gguf;
use refusal_patch::output::{preflight, write, Plan};
use refusal_patch::progress::{Progress, Silent};
use refusal_patch::Error;

/// A file system of 1 MB. Dropping unmounts it.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<SmallDisk> {
        let dir = tempfile::tempdir().unwrap();
        let args = ["-t", "tmpfs", "-o", "size=1m", "none"];
        let mounted = Command::new("mount").args(args).arg(dir.path()).output();
        if mounted.is_ok_and(|o| o.status.success()) {
            return Some(SmallDisk(dir));
        }
        println!("skipped: this process may not mount a file system");
        None
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).output();
    }
}

fn large_model() -> (tempfile::TempDir, PathBuf) {
    saved(&file(
        3,
        32,
        &[],
        &[tensor("t", &[300_000], 24, 300_000), tensor("u", &[300_000], 24, 300_000)],
    ))
}

#[test]
fn too_little_space_is_noticed_before_writing() {
    let Some(disk) = SmallDisk::mount() else { return };
    fs::write(disk.path().join("full"), vec![1; 700_000]).unwrap();
    let (_dir, path) = large_model();
    let source = Gguf::open(&path).unwrap();
    let out = disk.path().join("out.gguf");
    for result in [
        preflight(source.path(), &out, source.file_len(), false),
        write(&Plan::new(&source), &out, false, &Silent).map(|_| ()),
    ] {
        let Err(Error::Limit(message)) = result else { panic!("{result:?}") };
        assert!(message.contains("needs 600") && message.contains("are free"), "{message}");
    }
    assert_eq!(listing(disk.path()), ["full"]);
}

#[test]
fn a_disk_that_fills_up_while_writing_is_one_clear_error_and_keeps_nothing() {
    struct Fill(PathBuf);
    impl Progress for Fill {
        fn start(&self, stage: &str, _: u64, _: &str) {
            if stage == "writing" {
                fs::write(&self.0, vec![1; 700_000]).unwrap();
            }
        }
    }
    let Some(disk) = SmallDisk::mount() else { return };
    let (_dir, path) = large_model();
    let source = Gguf::open(&path).unwrap();
    let fill = Fill(disk.path().join("full"));
    let result = write(&Plan::new(&source), &disk.path().join("out.gguf"), false, &fill);
    let Err(Error::Limit(message)) = result else { panic!("{result:?}") };
    assert!(
        message.contains("no space is left") && message.contains("nothing was left behind"),
        "{message}"
    );
    assert_eq!(listing(disk.path()), ["full"]);
}
