//! What transformers (since 5) calls a folder's class and modules, where the folder's names differ.

use std::path::Path;

use super::sidecar::quote;
use crate::arch::Names;
use crate::checkpoint::Folder;
use crate::model::Model;

/// Whether the language model is a part of another one, which has vision or sound.
fn is_part(folder: &Folder) -> bool {
    let whole = std::ptr::eq(folder.text_config(), folder.config());
    !whole && class(folder).is_none_or(|c| !c.ends_with("ForCausalLM"))
}

/// The class that config.json names. Only a plain name: it goes into a command for a shell.
fn class(folder: &Folder) -> Option<&str> {
    let class = folder.config()["architectures"][0].as_str()?;
    let plain = class.starts_with(|c: char| c.is_ascii_uppercase())
        && class.chars().all(|c| c.is_ascii_alphanumeric());
    plain.then_some(class)
}

/// The class to load a folder with, to import from transformers.
pub(super) fn loader(folder: &Folder) -> &str {
    // A folder with code of its own has a class that transformers lacks.
    let own_code = !folder.config()["auto_map"].is_null();
    match (is_part(folder), class(folder).filter(|_| !own_code)) {
        (false, _) => "AutoModelForCausalLM",
        (true, Some(class)) => class,
        (true, None) => "AutoModelForImageTextToText",
    }
}

/// A tensor's name in the tree of modules: transformers renames what older folders hold as
/// `language_model.model.`, or without any prefix.
pub(super) fn in_tree(model: &Model, tensor: &str) -> String {
    let (Some(folder), Names::HuggingFace { prefix, .. }) = (model.file.folder(), &model.names)
    else {
        return tensor.into();
    };
    let tree = if is_part(folder) { "model.language_model." } else { "model." };
    tensor.strip_prefix(prefix.as_str()).map_or(tensor.into(), |rest| format!("{tree}{rest}"))
}

/// What a user types to load a folder that was written to OUT.
pub fn load_command(folder: &Folder, out: &Path) -> String {
    format!(
        "python -c \"import sys; from transformers import {} as M; \
         M.from_pretrained(sys.argv[1], dtype='auto')\" {}",
        loader(folder),
        quote(out)
    )
}
