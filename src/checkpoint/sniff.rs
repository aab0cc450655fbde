//! Guesses what a file is that isn't a GGUF file. Most wrong inputs are one of a dozen well-known
//! formats.

/// An error message about a file that isn't a GGUF file: what it is by its first bytes and, if that
/// is clear, what the user can do.
pub(super) fn looks_like(bytes: &[u8]) -> String {
    let head = &bytes[..bytes.len().min(4096)];
    let starts = |magic: &[u8]| head.starts_with(magic);
    let text =
        String::from_utf8_lossy(&head[..head.len().min(64)]).trim_start().to_ascii_lowercase();
    let known = if starts(b"version https://git-lfs") {
        "a Git LFS pointer, not the file itself: run `git lfs pull`, or download it from its page"
    } else if starts(b"PK\x03\x04") {
        "a zip or PyTorch file: convert it to GGUF first (llama.cpp's convert_hf_to_gguf.py)"
    } else if starts(b"\x80\x02") || starts(b"\x80\x04") {
        "a pickled PyTorch file: convert it to GGUF first (llama.cpp's convert_hf_to_gguf.py)"
    } else if is_safetensors(bytes) {
        "a safetensors file"
    } else if starts(b"lmgg") || starts(b"tjgg") || starts(b"fmgg") || starts(b"algg") {
        "a GGML file from before GGUF: convert it with a llama.cpp of 2023, or download a GGUF"
    } else if starts(b"\x1f\x8b") {
        "a gzip file: unpack it first"
    } else if starts(b"\x28\xb5\x2f\xfd") {
        "a zstd file: unpack it first"
    } else if starts(b"7z\xbc\xaf") || starts(b"Rar!") {
        "a packed archive: unpack it first"
    } else if starts(b"\x89HDF") {
        "an HDF5 file"
    } else if starts(b"\x93NUMPY") {
        "a NumPy file"
    } else if text.starts_with("<!doctype")
        || text.starts_with("<html")
        || text.starts_with("<?xml")
    {
        "an HTML page, as a download that needs a login gives: download the file itself"
    } else if text.starts_with('{') || text.starts_with('[') {
        "a JSON file"
    } else if head.iter().all(|&b| b == 0) {
        "zeros, as an interrupted download leaves: download it again"
    } else {
        let first: Vec<String> = head.iter().take(8).map(|b| format!("{b:02x}")).collect();
        return format!(
            "is not a GGUF file (it begins with the bytes {}); expected a GGUF file or a Hugging \
             Face folder",
            first.join(" ")
        );
    };
    format!("is not a GGUF file; it looks like {known}")
}

/// Whether the bytes begin as a safetensors file does: eight bytes of the header's length, then the
/// JSON header.
fn is_safetensors(bytes: &[u8]) -> bool {
    let Some((len, rest)) = bytes.split_first_chunk::<8>() else { return false };
    rest.first() == Some(&b'{') && u64::from_le_bytes(*len) < 100_000_000
}
