//! A Hugging Face checkpoint: a folder with `config.json` and safetensors files, or one safetensors
//! file of such a folder.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::{python, safetensors, Map, Tensor};
use crate::{Error, Result};

/// The weights of a folder with a single safetensors file.
const SINGLE: &str = "model.safetensors";
/// The index of a folder with several safetensors files: which file holds which tensor.
const INDEX: &str = "model.safetensors.index.json";
/// Size limit of JSON files. No model's JSON file comes near it.
const LONGEST_JSON: u64 = 256 << 20;

/// An open folder: its configuration, and the tensors of its memory-mapped safetensors files.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    dir: PathBuf,
    config: Value,
    files: Vec<(PathBuf, Map)>,
    tensors: Vec<Tensor>,
    names: HashMap<String, usize>,
    absent: Vec<(String, String)>,
}

impl Folder {
    /// Opens a folder, or one safetensors file of a folder. Checks every header and the index, so
    /// that a damaged or hostile checkpoint fails here and not later.
    ///
    /// # Errors
    /// A file is missing or damaged; the index names a file outside the folder; the index and the
    /// files disagree; two files hold tensors of one name.
    pub fn open(path: &Path) -> Result<Folder> {
        let whole = std::fs::metadata(path).map_err(Error::io(path))?.is_dir();
        let dir = if whole { path } else { parent(path) };
        // Spell the path as a listing of `dir` does: `model.safetensors` is `./model.safetensors`
        // there.
        let spelled =
            if whole { path.to_path_buf() } else { dir.join(path.file_name().unwrap_or_default()) };
        let path = spelled.as_path();
        let config = dir.join("config.json");
        if !config.exists() {
            let what = match ggufs(dir).first().filter(|_| whole) {
                Some(name) => {
                    format!("has no config.json; name the file inside it, such as {name}")
                }
                None if dir.join("adapter_config.json").exists() => {
                    "is an adapter (adapter_config.json), not a model; \
                     give the model that it is for"
                        .into()
                }
                None if whole => "has no config.json, so it is not a model folder".into(),
                None => "has no config.json beside it; \
                         a safetensors checkpoint can't be read without one"
                    .into(),
            };
            return Err(Error::format(path, None, what));
        }
        let config = read_json(&config)?;
        let listed = if whole {
            list(dir)?
        } else {
            Listed { files: vec![path.to_path_buf()], map: Vec::new() }
        };
        let mut files = Vec::new();
        let mut tensors: Vec<Tensor> = Vec::new();
        let mut names = HashMap::new();
        for (i, file) in listed.files.iter().enumerate() {
            let map = Map::open(file)?;
            for t in safetensors::parse(file, map.bytes(), i)? {
                if let Some(other) = names.insert(t.name.clone(), tensors.len()) {
                    let first: &Tensor = &tensors[other];
                    let what = format!(
                        "tensor `{}` is also in {}",
                        t.name,
                        listed.files[first.file].display()
                    );
                    return Err(Error::format(
                        file,
                        None,
                        format!("{what}; download both files again"),
                    ));
                }
                tensors.push(t);
            }
            files.push((file.clone(), map));
        }
        let mut absent = Vec::new();
        for (name, file) in listed.map {
            let claimed = &listed.files[file];
            match names.get(&name).map(|&i| tensors[i].file) {
                Some(found) if found == file => {}
                Some(found) => {
                    let what = format!(
                        "says that tensor `{name}` is in {}, where it is not",
                        claimed.display()
                    );
                    let place = listed.files[found].display();
                    let what = format!(
                        "{what}: it is in {place}; download the index and both files again"
                    );
                    return Err(Error::format(dir.join(INDEX), None, what));
                }
                None => {
                    let file =
                        claimed.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    absent.push((name, file));
                }
            }
        }
        Ok(Folder {
            path: path.to_path_buf(),
            dir: dir.to_path_buf(),
            config,
            files,
            tensors,
            names,
            absent,
        })
    }

    /// Tensors that the index names but no file holds, as (tensor, file that should hold it).
    /// Published checkpoints list output heads that their publishers left out.
    pub fn absent(&self) -> &[(String, String)] {
        &self.absent
    }

    /// The path that was opened: a folder, or a file in one.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that holds `config.json`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The content of `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The language model's part of `config.json`: the `text_config` of a multimodal model, all of
    /// `config.json` otherwise.
    pub fn text_config(&self) -> &Value {
        self.config.get("text_config").filter(|v| v.is_object()).unwrap_or(&self.config)
    }

    /// The safetensors files. Their order is that of the index [`Tensor::file`].
    pub fn files(&self) -> impl ExactSizeIterator<Item = (&Path, &Map)> {
        self.files.iter().map(|(path, map)| (path.as_path(), map))
    }

    /// Size in bytes of all safetensors files together.
    pub fn file_len(&self) -> u64 {
        self.files.iter().map(|(_, map)| map.bytes().len() as u64).sum()
    }

    /// All tensors, file by file, in the order of their bytes.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.names.get(name).map(|&i| &self.tensors[i])
    }

    /// The bytes of tensor `t`, which must be one of this folder's.
    pub fn bytes(&self, t: &Tensor) -> &[u8] {
        &self.map(t).bytes()[t.offset as usize..(t.offset + t.len) as usize]
    }

    /// The map of the file that holds tensor `t`.
    pub(super) fn map(&self, t: &Tensor) -> &Map {
        &self.files[t.file].1
    }

    /// The content of the folder's JSON file `name`; `None` if the folder has no such file.
    ///
    /// # Errors
    /// The file can't be read, or isn't JSON.
    pub fn json(&self, name: &str) -> Result<Option<Value>> {
        let path = self.dir.join(name);
        if !path.exists() {
            return Ok(None);
        }
        read_json(&path).map(Some)
    }

    /// The content of the folder's text file `name`; `None` if the folder has no such file.
    ///
    /// # Errors
    /// The file can't be read, or isn't UTF-8.
    pub fn text(&self, name: &str) -> Result<Option<String>> {
        let path = self.dir.join(name);
        if !path.exists() {
            return Ok(None);
        }
        std::fs::read_to_string(&path).map(Some).map_err(Error::io(&path))
    }
}

/// The safetensors files of a folder.
struct Listed {
    files: Vec<PathBuf>,
    /// The index: (tensor, position in `files` of the file that should hold it). Empty without an
    /// index.
    map: Vec<(String, usize)>,
}

/// Lists the safetensors files of a folder: [`SINGLE`] if there is one, else the files that
/// [`INDEX`] names. Transformers looks for the two in this order.
fn list(dir: &Path) -> Result<Listed> {
    let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
    if single.exists() {
        return Ok(Listed { files: vec![single], map: Vec::new() });
    }
    if !index.exists() {
        let what = match with_extension(dir, "safetensors").as_slice() {
            [] => format!(
                "has neither {SINGLE} nor {INDEX}; only safetensors checkpoints can be read"
            ),
            some => format!(
                "has neither {SINGLE} nor {INDEX}; name a file inside it, such as {}",
                some[0]
            ),
        };
        return Err(Error::format(dir, None, what));
    }
    let wrong = |what: String| Error::format(&index, None, what);
    let value = read_json(&index)?;
    let map = value["weight_map"]
        .as_object()
        .ok_or_else(|| wrong("has no `weight_map` object".into()))?;
    let mut names: Vec<&str> = Vec::new();
    for (tensor, file) in map {
        let file =
            file.as_str().ok_or_else(|| wrong(format!("names no file for tensor `{tensor}`")))?;
        let mut parts = Path::new(file).components();
        let plain = match (parts.next(), parts.next()) {
            (Some(Component::Normal(name)), None) => name == OsStr::new(file),
            _ => false,
        };
        if !plain || file.contains(['/', '\\', ':', '\0']) {
            let what = format!(
                "puts tensor `{tensor}` into {file:?}; expected a file name in the same folder"
            );
            return Err(wrong(format!("{what}; don't trust this checkpoint")));
        }
        names.push(file);
    }
    names.sort_unstable();
    names.dedup();
    let missing: Vec<&str> = names.iter().copied().filter(|n| !dir.join(n).exists()).collect();
    if !missing.is_empty() {
        let (n, of) = (missing.len(), names.len());
        let some = missing[..n.min(3)].join(", ");
        return Err(wrong(format!(
            "{n} of the {of} files that it names are missing ({some}); download them"
        )));
    }
    let index_of = |file: &Value| names.iter().position(|n| Some(*n) == file.as_str()).unwrap_or(0);
    let map = map.iter().map(|(tensor, file)| (tensor.clone(), index_of(file))).collect();
    Ok(Listed { files: names.iter().map(|n| dir.join(n)).collect(), map })
}

/// The folder that holds a file; `.` for a bare file name.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn ggufs(dir: &Path) -> Vec<String> {
    with_extension(dir, "gguf")
}

/// The sorted names of a folder's files with this extension.
fn with_extension(dir: &Path, extension: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|e| e.path())
        .filter(|p| p.extension() == Some(OsStr::new(extension)))
        .filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned()))
        .collect();
    names.sort();
    names
}

/// Reads a JSON file. Python's `json` module writes the literals `NaN` and `Infinity`, which JSON
/// doesn't have; they are read as strings. A key that must hold a number then fails with an error
/// that names the key.
///
/// # Errors
/// The file can't be read, is larger than any model's JSON file, or isn't JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let meta = std::fs::metadata(path).map_err(Error::io(path))?;
    if !meta.is_file() || meta.len() > LONGEST_JSON {
        return Err(Error::format(
            path,
            None,
            format!("is not a JSON file of at most {LONGEST_JSON} bytes"),
        ));
    }
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes)
        .or_else(|e| python::quoted(&bytes).and_then(|b| serde_json::from_slice(&b).ok()).ok_or(e))
        .map_err(|e| {
            let what = match bytes.starts_with("\u{feff}".as_bytes()) {
                true => {
                    "it begins with a byte order mark; save it in UTF-8 without one".to_string()
                }
                false => format!("{e}; correct the file there, or download it again"),
            };
            Error::format(path, None, format!("is not JSON: {what}"))
        })
}
