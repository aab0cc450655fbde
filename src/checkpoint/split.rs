//! Split models: `NAME-00001-of-00003.gguf` and its siblings, as llama.cpp's `llama-gguf-split`
//! writes them (`tools/gguf-split/gguf-split.cpp`, `llama_split_path` in `src/llama.cpp`).
//!
//! The first shard has the model's metadata; every shard has the three `split.*` keys and its own
//! tensors. llama.cpp finds the other shards by the name of the first (`llama_get_list_splits` in
//! `src/llama-model-loader.cpp`).

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::{Shard, Value};
use crate::{Error, Result};

/// Which shard a file is, from 0.
const NUMBER: &str = "split.no";
/// How many shards the model has. llama.cpp reads 16 bits.
const COUNT: &str = "split.count";
/// How many tensors all shards have together. llama.cpp reads a signed integer of 32 bits.
pub(crate) const TENSORS: &str = "split.tensors.count";

/// What a shard's name says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardName {
    /// The path up to the number, folder included.
    pub prefix: PathBuf,
    /// Which shard it is, from 1.
    pub number: usize,
    /// How many there are.
    pub count: usize,
}

impl ShardName {
    /// Reads `PREFIX-00002-of-00003.gguf`; `None` for another name.
    pub fn of(path: &Path) -> Option<ShardName> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| {
            let plain = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| text.parse().ok()).flatten()
        };
        let (number, count) = (digits(number)?, digits(count)?);
        let known = (1..=count).contains(&number);
        known.then(|| ShardName { prefix: path.with_file_name(prefix), number, count })
    }

    /// The path of a shard of the same model; `number` counts from 1.
    pub fn path(&self, number: usize) -> PathBuf {
        let mut path = OsString::from(&self.prefix);
        path.push(ending(number, self.count));
        path.into()
    }

    /// The paths of all shards, in order.
    pub fn paths(&self) -> impl Iterator<Item = PathBuf> + '_ {
        (1..=self.count).map(|number| self.path(number))
    }
}

/// How the name of a shard ends; `number` counts from 1.
fn ending(number: usize, count: usize) -> String {
    format!("-{number:05}-of-{count:05}.gguf")
}

/// Opens a file, and all other shards where it is one. Any shard stands for the whole model.
///
/// # Errors
/// What [`Shard::open`] says; a shard that is missing, misnamed, or of another model.
pub(super) fn open(path: &Path) -> Result<Vec<Shard>> {
    let opened = Shard::open(path)?;
    // Merged models keep the key with a count of 0.
    let count = opened.get(COUNT).and_then(Value::as_u64).unwrap_or(0);
    if count < 2 {
        return Ok(vec![opened]);
    }
    let name = name(&opened, count)?;
    let missing: Vec<PathBuf> = name.paths().filter(|p| !p.exists()).collect();
    if !missing.is_empty() {
        let n = missing.len();
        let some: Vec<String> = missing.iter().take(3).map(|p| file_name(p)).collect();
        let what = format!(
            "is one of {count} shards of a model, and {n} {} missing: {}{}; download all shards to \
             the same folder",
            if n == 1 { "is" } else { "are" },
            some.join(", "),
            if n > 3 { " ..." } else { "" }
        );
        return Err(Error::format(path, None, what));
    }
    let mut shards = Vec::new();
    let mut opened = Some(opened);
    for number in 1..=name.count {
        let own = opened.take_if(|_| number == name.number);
        let mut shard = own.map_or_else(|| Shard::open(&name.path(number)), Ok)?;
        check_place(&shard, number, name.count, path)?;
        shard.number(number - 1);
        shards.push(shard);
    }
    check_together(&shards)?;
    Ok(shards)
}

/// The name of a shard, which must be the one that its metadata ask for.
fn name(shard: &Shard, count: u64) -> Result<ShardName> {
    let bad = |what: String| Error::format(shard.path(), None, what);
    let Some(number) = shard.get(NUMBER).and_then(Value::as_u64) else {
        return Err(bad(format!(
            "its {COUNT} is {count} and its {NUMBER} is missing; download it again"
        )));
    };
    if number >= count || count > u16::MAX.into() {
        return Err(bad(format!(
            "its {NUMBER} is {number} and its {COUNT} {count}; expected a number below the count, \
             and a count of at most {}; download it again",
            u16::MAX
        )));
    }
    let (number, count) = (number as usize + 1, count as usize);
    match ShardName::of(shard.path()) {
        Some(name) if (name.number, name.count) == (number, count) => Ok(name),
        _ => Err(bad(format!(
            "is shard {number} of {count} by its metadata, so its name must end in {}, by which \
             the other shards are found; give it and the others their names back",
            ending(number, count)
        ))),
    }
}

/// A shard's own metadata must say what its name says. `asked`: the shard that the count is from.
fn check_place(shard: &Shard, number: usize, count: usize, asked: &Path) -> Result<()> {
    let of = |key: &str| shard.get(key).and_then(Value::as_u64);
    let show = |value: Option<u64>| value.map_or("missing".into(), |v| v.to_string());
    if of(COUNT) != Some(count as u64) {
        let what = format!(
            "its {COUNT} is {}, expected {count} as in {}; it is a file of another model, download \
             it again",
            show(of(COUNT)),
            file_name(asked)
        );
        return Err(Error::format(shard.path(), None, what));
    }
    if of(NUMBER) != Some(number as u64 - 1) {
        let what = format!(
            "its {NUMBER} is {}, expected {} by its name; another shard has taken its place, \
             download it again",
            show(of(NUMBER)),
            number - 1
        );
        return Err(Error::format(shard.path(), None, what));
    }
    Ok(())
}

/// All shards must be of one model: the same architecture where they name one, the same number of
/// tensors in all, and none twice.
fn check_together(shards: &[Shard]) -> Result<()> {
    const ARCHITECTURE: &str = "general.architecture";
    let Some(first) = shards.first() else { return Ok(()) };
    let wrong = |shard: &Shard, what: String| Err(Error::format(shard.path(), None, what));
    let number = |shard: &Shard| shard.get(TENSORS).and_then(Value::as_u64);
    let Some(expected) = number(first) else {
        return wrong(first, format!("its {TENSORS} is missing; download it again"));
    };
    let text = |shard: &Shard| {
        let value = shard.get(ARCHITECTURE)?;
        Some(String::from_utf8_lossy(value.as_bytes()?).into_owned())
    };
    let mut seen: HashMap<&str, &Shard> = HashMap::new();
    for shard in shards {
        if let Some((found, expected)) = text(shard).zip(text(first)).filter(|(a, b)| a != b) {
            let what = format!(
                "its {ARCHITECTURE} is {found}, expected {expected} as in {}; it is a file of \
                 another model, download it again",
                file_name(first.path())
            );
            return wrong(shard, what);
        }
        if let Some(found) = number(shard).filter(|found| *found != expected) {
            let what = format!(
                "its {TENSORS} is {found}, expected {expected} as in {}; it is a file of another \
                 model, download it again",
                file_name(first.path())
            );
            return wrong(shard, what);
        }
        for t in shard.tensors() {
            if let Some(other) = seen.insert(&t.name, shard) {
                let what = format!(
                    "tensor `{}` is also in {}; download both files again",
                    t.name,
                    file_name(other.path())
                );
                return wrong(shard, what);
            }
        }
    }
    if seen.len() as u64 != expected {
        let what = format!(
            "its {TENSORS} is {expected}, and its {} shards hold {} tensors; files of two models \
             are mixed, download all shards again",
            shards.len(),
            seen.len()
        );
        return wrong(first, what);
    }
    Ok(())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_known_by_its_name() {
        let name = ShardName::of(Path::new("some/m-Q4_K_M-00002-of-00003.gguf")).unwrap();
        let found = (name.prefix.as_path(), name.number, name.count);
        assert_eq!(found, (Path::new("some/m-Q4_K_M"), 2, 3));
        assert_eq!(name.path(1), Path::new("some/m-Q4_K_M-00001-of-00003.gguf"));
        assert_eq!(name.paths().count(), 3);
        for other in [
            "m.gguf",
            "m-00001-of-00002",
            "m-1-of-2.gguf",
            "m-00003-of-00002.gguf",
            "m-00000-of-00002.gguf",
            "m-00001-of-+0002.gguf",
            "m-00001-of-00002.gguf.part1of2",
        ] {
            assert_eq!(ShardName::of(Path::new(other)), None, "{other}");
        }
    }
}
