//! Which forms of an edit the client applies to which architecture (llama.cpp `src/models/*.cpp`).

use crate::arch::Arch;
use crate::edit::Method;
use crate::error::{Error, Result};
use crate::output::Emit;

/// Architectures whose llama.cpp graph never adds a control vector (`src/models/*.cpp` without
/// `build_cvec`).
const DEAF: [&str; 16] = [
    "hy-v4",
    "plamo2",
    "qwen4exp",
    "gemma4-assistant",
    "dflash",
    "eagle3",
    "bert",
    "nomic-bert",
    "nomic-bert-moe",
    "jina-bert-v2",
    "jina-bert-v3",
    "modern-bert",
    "neo-bert",
    "eurobert",
    "wavtokenizer-dec",
    "t5encoder",
];

/// Whether the client would apply an edit in the form that is asked for. The client is llama.cpp,
/// or transformers for a Hugging Face `folder`; `experts`: the model has some.
///
/// # Errors
/// An architecture whose graph ignores control vectors, or whose loader refuses a bias; a gate in a
/// form that has none.
pub fn can_carry(
    arch: &str,
    experts: bool,
    folder: bool,
    emit: Emit,
    method: Method,
) -> Result<()> {
    let refuse = |what: &str| {
        let hint = "use `emit` weights or `emit` lora, with `method` auto";
        Err(Error::unsupported(format!("{what} (architecture {arch})"), hint))
    };
    if folder {
        return match (emit, method) {
            (Emit::ControlVector, _) => refuse("control vectors are for GGUF files"),
            (_, Method::Add) => refuse("these models have no bias that could carry a constant"),
            _ => Ok(()),
        };
    }
    match (emit, method) {
        (Emit::ControlVector, _) if DEAF.contains(&arch) => {
            refuse("llama.cpp ignores control vectors here")
        }
        (Emit::ControlVector, Method::Gated | Method::Amplify | Method::Restore) => {
            refuse("a control vector is a constant")
        }
        (Emit::Lora, Method::Add) => refuse("a LoRA adapter can't carry a constant"),
        (Emit::Weights, Method::Add)
            if experts || !Arch::of_gguf(arch).is_some_and(|a| a.takes_bias) =>
        {
            refuse("llama.cpp refuses files with a bias of attn_output or ffn_down here")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_that_llama_cpp_would_not_hear_are_refused() {
        assert!(can_carry("llama", false, false, Emit::ControlVector, Method::Add).is_ok());
        assert!(can_carry("plamo2", false, false, Emit::ControlVector, Method::Add).is_err());
        assert!(can_carry("llama", false, false, Emit::Weights, Method::Add).is_ok());
        assert!(can_carry("qwen2", false, false, Emit::Weights, Method::Add).is_err());
        assert!(can_carry("llama", true, false, Emit::Weights, Method::Add).is_err());
        assert!(can_carry("qwen2", false, false, Emit::Weights, Method::Gated).is_ok());
        assert!(can_carry("llama", false, false, Emit::Lora, Method::Add).is_err());
        assert!(can_carry("llama", false, true, Emit::Lora, Method::Gated).is_ok());
        assert!(can_carry("llama", false, true, Emit::Weights, Method::Add).is_err());
        assert!(can_carry("llama", false, true, Emit::ControlVector, Method::Add).is_err());
    }
}
