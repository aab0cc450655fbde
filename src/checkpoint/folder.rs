//! A Hugging Face checkpoint: a folder with `config.json` and safetensors files, or one such file
//! beside its config.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::{python, safetensors, Map, Tensor};
use crate::{Error, Result};

/// The file of weights in a folder that has one only.
const SINGLE: &str = "model.safetensors";
/// The list of them in a folder that has several.
const INDEX: &str = "model.safetensors.index.json";
/// JSON files beside the weights that are longer are none of a model's.
const LONGEST_JSON: u64 = 256 << 20;

/// An open folder: its configuration, and the tensors of all its safetensors files by memory map.
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
    /// Opens a folder, or a single safetensors file in one. Every header and the index are checked,
    /// so that a damaged or hostile checkpoint is one error at once.
    ///
    /// # Errors
    /// A file that is missing, damaged, or named outside of the folder; names that don't fit
    /// together.
    pub fn open(path: &Path) -> Result<Folder> {
        let whole = std::fs::metadata(path).map_err(Error::io(path))?.is_dir();
        let dir = if whole { path } else { parent(path) };
        // As a listing of the folder spells it: `model.safetensors` is `./model.safetensors` there.
        let spelled =
            if whole { path.to_path_buf() } else { dir.join(path.file_name().unwrap_or_default()) };
        let path = spelled.as_path();
        let config = dir.join("config.json");
        if !config.exists() {
            let what = match ggufs(dir).first().filter(|_| whole) {
                Some(name) => format!("has no config.json; name the file inside it, such as {name}"),
                None if dir.join("adapter_config.json").exists() => {
                    "is an adapter (adapter_config.json), not a model; give the model that it is for".into()
                }
                None if whole => "has no config.json, so it is no model folder".into(),
                None => "has no config.json beside it, which a safetensors checkpoint is read with".into(),
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
            let said = &listed.files[file];
            match names.get(&name).map(|&i| tensors[i].file) {
                Some(found) if found == file => {}
                Some(found) => {
                    let what = format!(
                        "says that tensor `{name}` is in {}, where it is not",
                        said.display()
                    );
                    let place = listed.files[found].display();
                    let what = format!(
                        "{what}: it is in {place}; download the index and both files again"
                    );
                    return Err(Error::format(dir.join(INDEX), None, what));
                }
                None => {
                    let file = said.file_name().unwrap_or_default().to_string_lossy().into_owned();
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

    /// Tensors that the index names and no file has, with the files where they should be. Published
    /// checkpoints have such names, of heads that were left out.
    pub fn absent(&self) -> &[(String, String)] {
        &self.absent
    }

    /// The path that was opened: a folder or a file in it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The language model's part of `config.json`: of a multimodal model its `text_config`, else
    /// all of it.
    pub fn text_config(&self) -> &Value {
        self.config.get("text_config").filter(|v| v.is_object()).unwrap_or(&self.config)
    }

    /// The safetensors files, in the order of [`Tensor::file`].
    pub fn files(&self) -> impl ExactSizeIterator<Item = (&Path, &Map)> {
        self.files.iter().map(|(path, map)| (path.as_path(), map))
    }

    /// The sum of their sizes.
    pub fn file_len(&self) -> u64 {
        self.files.iter().map(|(_, map)| map.bytes().len() as u64).sum()
    }

    /// The tensors, file by file in the order of their bytes.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.names.get(name).map(|&i| &self.tensors[i])
    }

    /// A tensor's bytes. The tensor must be one of this checkpoint's.
    pub fn bytes(&self, t: &Tensor) -> &[u8] {
        &self.map(t).bytes()[t.offset as usize..(t.offset + t.len) as usize]
    }

    /// The map of the file that holds a tensor.
    pub(super) fn map(&self, t: &Tensor) -> &Map {
        &self.files[t.file].1
    }

    /// A JSON file of the folder; `None` where there is none.
    ///
    /// # Errors
    /// A file that can't be read or isn't JSON.
    pub fn json(&self, name: &str) -> Result<Option<Value>> {
        let path = self.dir.join(name);
        if !path.exists() {
            return Ok(None);
        }
        read_json(&path).map(Some)
    }

    /// A text file of the folder; `None` where there is none.
    ///
    /// # Errors
    /// A file that can't be read or isn't UTF-8.
    pub fn text(&self, name: &str) -> Result<Option<String>> {
        let path = self.dir.join(name);
        if !path.exists() {
            return Ok(None);
        }
        std::fs::read_to_string(&path).map(Some).map_err(Error::io(&path))
    }
}

/// The files to read, and which tensor the index says is in which.
struct Listed {
    files: Vec<PathBuf>,
    map: Vec<(String, usize)>,
}

/// The weights of a folder, in the order in which transformers looks for them.
fn list(dir: &Path) -> Result<Listed> {
    let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
    if single.exists() {
        return Ok(Listed { files: vec![single], map: Vec::new() });
    }
    if !index.exists() {
        let what = match by_ending(dir, "safetensors").as_slice() {
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
    let bad = |what: String| Error::format(&index, None, what);
    let value = read_json(&index)?;
    let map =
        value["weight_map"].as_object().ok_or_else(|| bad("has no `weight_map` object".into()))?;
    let mut names: Vec<&str> = Vec::new();
    for (tensor, file) in map {
        let file =
            file.as_str().ok_or_else(|| bad(format!("names no file for tensor `{tensor}`")))?;
        let mut parts = Path::new(file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(n)), None) if n == OsStr::new(file));
        if !plain || file.contains(['/', '\\', ':', '\0']) {
            let what = format!(
                "puts tensor `{tensor}` into {file:?}; expected a file name in the same folder"
            );
            return Err(bad(format!("{what}; don't trust this checkpoint")));
        }
        names.push(file);
    }
    names.sort_unstable();
    names.dedup();
    let missing: Vec<&str> = names.iter().copied().filter(|n| !dir.join(n).exists()).collect();
    if !missing.is_empty() {
        let (n, of) = (missing.len(), names.len());
        let some = missing[..n.min(3)].join(", ");
        return Err(bad(format!(
            "{n} of the {of} files that it names are missing ({some}); download them"
        )));
    }
    let place = |file: &Value| names.iter().position(|n| Some(*n) == file.as_str()).unwrap_or(0);
    let map = map.iter().map(|(tensor, file)| (tensor.clone(), place(file))).collect();
    Ok(Listed { files: names.iter().map(|n| dir.join(n)).collect(), map })
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn ggufs(dir: &Path) -> Vec<String> {
    by_ending(dir, "gguf")
}

fn by_ending(dir: &Path, ending: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|e| e.path())
        .filter(|p| p.extension() == Some(OsStr::new(ending)))
        .filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned()))
        .collect();
    names.sort();
    names
}

/// Reads a JSON file. Python's literals `NaN` and `Infinity`, which its `json` module writes, are
/// taken as strings, so that a number that must be one is missed.
///
/// # Errors
/// A file that can't be read, is far too long, or isn't JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let meta = std::fs::metadata(path).map_err(Error::io(path))?;
    if !meta.is_file() || meta.len() > LONGEST_JSON {
        return Err(Error::format(
            path,
            None,
            format!("is no JSON file of at most {LONGEST_JSON} bytes"),
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
                false => format!("{e}; correct it there, or download it again"),
            };
            Error::format(path, None, format!("is not JSON: {what}"))
        })
}
