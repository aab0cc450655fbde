//! Finds a module's weights in a Hugging Face folder, in any supported packing: which tensors
//! belong together, and whether their shapes and values fit.

mod by_input;
mod bytes;
mod fours;
mod sparse;
mod torchao;

use serde_json::Value;

use crate::checkpoint::{Folder, Tensor};
use crate::encoding::packed::{Groups, Layout, Levels, Numbers, Packed, Zeros};
use crate::encoding::{Encoding, Fp8};
use crate::error::{Error, Result};
use crate::weights::{Matrix, Storage};

pub(super) use by_input::by_input;
pub use fours::packed_experts;

const HINT: &str = "use a checkpoint of the same model in another packing, or its GGUF file";

/// A module (a linear layer) of a folder: its tensors are named `NAME.weight`, `NAME.weight_scale`
/// and so on.
struct Module<'a, 'n> {
    folder: &'a Folder,
    name: &'n str,
    /// The folder's `quantization_config`.
    config: &'a Value,
}

/// The packed matrix of a module, and the tensor that holds its codes. `None` if the module's
/// weights are plain floats.
///
/// # Errors
/// The packing can't be read; tensors are missing or don't fit together.
pub(super) fn find<'a>(folder: &'a Folder, name: &str) -> Result<Option<(Matrix<'a>, &'a Tensor)>> {
    let m = Module { folder, name, config: configuration(folder) };
    if let Some(t) = m.get("weight_packed") {
        return match t.type_name().as_str() {
            "U8" => m.compressed_fours(t),
            _ => m.compressed(t),
        }
        .map(Some);
    }
    if let Some(t) = m.get("compressed") {
        return m.sparse(t).map(Some);
    }
    if let Some(t) = m.get("_weight_qdata") {
        return m.torchao(t).map(Some);
    }
    if let Some(t) = m.get("qweight") {
        return match m.config["quant_method"].as_str() {
            Some("awq") => m.awq(t),
            Some("gptq") => m.gptq(t),
            other => Err(m.unreadable(t, &format!("quant_method {}", other.unwrap_or("missing")))),
        }
        .map(Some);
    }
    let Some(t) = m.get("weight") else { return Ok(None) };
    match t.type_name().as_str() {
        "F8_E4M3" => m.float8(t, Fp8::E4M3).map(Some),
        "F8_E5M2" => m.float8(t, Fp8::E5M2).map(Some),
        "I8" => m.int8(t).map(Some),
        "U8" => match m.get("weight_scale_2") {
            Some(second) => m.modelopt(t, second),
            None => m.bitsandbytes(t),
        }
        .map(Some),
        _ => Ok(None),
    }
}

/// The name of a module's packing, and the tensor that holds the codes. `None` for plain floats,
/// and for a packing that can't be read.
pub fn packing_of<'a>(folder: &'a Folder, module: &str) -> Option<(&'static str, &'a Tensor)> {
    let (matrix, codes) = find(folder, module).ok()??;
    Some((matrix.encoding.name(), codes))
}

/// The folder's `quantization_config`; null if there is none.
fn configuration(folder: &Folder) -> &Value {
    [folder.config(), folder.text_config()]
        .into_iter()
        .map(|c| &c["quantization_config"])
        .find(|c| c.is_object())
        .unwrap_or(&Value::Null)
}

/// A list of a module's tensors and their types, for an error about a packing that can't be read.
/// `None` if the module has no tensors.
pub(super) fn unknown(folder: &Folder, name: &str) -> Option<String> {
    let prefix = format!("{name}.");
    let mut list: Vec<String> = folder
        .tensors()
        .iter()
        .filter_map(|t| Some(format!("{} {}", t.name.strip_prefix(&prefix)?, t.type_name())))
        .collect();
    list.sort();
    list.truncate(8);
    (!list.is_empty()).then(|| list.join(", "))
}

impl<'a> Module<'a, '_> {
    /// The module's tensor `part`, such as `weight_scale`.
    fn get(&self, part: &str) -> Option<&'a Tensor> {
        self.folder.tensor(&format!("{}.{part}", self.name))
    }

    /// The module's tensor `part`, which must exist.
    fn need(&self, part: &str) -> Result<&'a Tensor> {
        self.get(part).ok_or_else(|| self.wrong(&format!("tensor {}.{part} is missing", self.name)))
    }

    fn bytes(&self, t: &Tensor) -> &'a [u8] {
        self.folder.bytes(t)
    }

    /// The error for a damaged checkpoint.
    fn wrong(&self, what: &str) -> Error {
        Error::Model(format!(
            "{}: {what}; download the checkpoint again",
            self.folder.path().display()
        ))
    }

    /// The error for a packing that this program doesn't read.
    fn unreadable(&self, t: &Tensor, what: &str) -> Error {
        let path = self.folder.path().display();
        Error::unsupported(
            format!("{path}: tensor {} is packed in a way that can't be read ({what})", t.name),
            HINT,
        )
    }

    /// The shape of a tensor that must be a matrix, in Hugging Face's order: rows, columns.
    fn shape(&self, t: &Tensor) -> Result<(usize, usize)> {
        match t.dims[..] {
            [cols, rows] => Ok((rows as usize, cols as usize)),
            _ => Err(self.wrong(&format!(
                "tensor {} has the shape {:?}, expected a matrix",
                t.name,
                shown(t)
            ))),
        }
    }

    /// The bytes of a tensor that must have one of the types `kinds` and the given number of
    /// elements.
    fn exact(&self, t: &'a Tensor, kinds: &[&str], elements: usize) -> Result<&'a [u8]> {
        if !kinds.contains(&t.type_name().as_str()) || t.elements() != elements as u64 {
            return Err(self.wrong(&format!(
                "tensor {} is {} {:?}, expected {} of {elements} elements",
                t.name,
                t.type_name(),
                shown(t),
                kinds.join(" or ")
            )));
        }
        Ok(self.bytes(t))
    }

    /// The whole numbers of a tensor, I64 or I32.
    fn numbers(&self, t: &Tensor) -> Vec<u64> {
        let width = if t.type_name() == "I64" { 8 } else { 4 };
        let number = |b: &[u8]| b.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        self.bytes(t).chunks_exact(width).map(number).collect()
    }

    /// The formats that the configuration of compressed-tensors names.
    fn formats(&self) -> Vec<&str> {
        let groups = self.config["config_groups"].as_object();
        let of_groups = groups.into_iter().flat_map(|g| g.values()).map(|g| &g["format"]);
        [&self.config["format"]].into_iter().chain(of_groups).filter_map(Value::as_str).collect()
    }

    /// The float type in which the model computes.
    fn dtype(&self) -> Encoding {
        let configs = [self.folder.text_config(), self.folder.config()];
        let named = configs.iter().find_map(|c| c["dtype"].as_str().or(c["torch_dtype"].as_str()));
        match named {
            Some("float16") => Encoding::F16,
            Some("bfloat16") => Encoding::BF16,
            _ => Encoding::F32,
        }
    }

    /// The scales in a tensor of floats, and the type of these floats.
    fn scales(&self, t: &'a Tensor, elements: usize) -> Result<(Numbers<'a>, Encoding)> {
        let bytes = self.exact(t, &["F32", "F16", "BF16"], elements)?;
        let encoding = Encoding::from_ggml(t.type_id).unwrap_or(Encoding::F32);
        Ok((Numbers::Plain(encoding, bytes), encoding))
    }

    /// The group of each input. The group numbers are checked here, because decoding doesn't check
    /// them.
    fn index(&self, t: Option<&'a Tensor>, cols: usize, groups: usize) -> Result<Option<&'a [u8]>> {
        let Some(t) = t.filter(|t| t.elements() > 0) else { return Ok(None) };
        let bytes = self.exact(t, &["I32"], cols)?;
        let all = bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        if all.into_iter().any(|g| g < 0 || g as usize >= groups) {
            return Err(self.wrong(&format!(
                "tensor {} names groups that there are not; expected 0 to {}",
                t.name,
                groups - 1
            )));
        }
        Ok(Some(bytes))
    }

    /// The matrix whose codes lie in tensor `t`, together with `t`.
    fn matrix(&self, t: &'a Tensor, packed: Packed<'a>) -> (Matrix<'a>, &'a Tensor) {
        let (rows, cols) = (packed.rows, packed.cols);
        (Matrix { rows, cols, encoding: Storage::Packed(packed), bytes: self.bytes(t) }, t)
    }

    /// Format `pack-quantized` of compressed-tensors: `weight_packed`, `weight_scale`,
    /// `weight_shape` and, for asymmetric codes, `weight_zero_point`.
    fn compressed(&self, t: &'a Tensor) -> Result<(Matrix<'a>, &'a Tensor)> {
        if t.type_name() != "I32" || self.get("scale_packed").is_some() {
            let formats = self.formats().join(", ");
            return Err(self.unreadable(t, &format!("{} codes, format {formats}", t.type_name())));
        }
        let shape = self.need("weight_shape")?;
        let numbers = self.numbers(shape);
        let (rows, words) = self.shape(t)?;
        let &[first, cols] = &numbers[..] else {
            return Err(self.wrong(&format!("tensor {} must hold two numbers", shape.name)));
        };
        let cols = usize::try_from(cols).unwrap_or(0).min(1 << 40);
        let bits = self.bits(rows, cols, words).filter(|_| first as usize == rows);
        let Some(bits) = bits else {
            let what = format!(
                "tensor {} has the shape {:?}, which does not fit {} {numbers:?}",
                t.name,
                shown(t),
                shape.name
            );
            return Err(self.wrong(&what));
        };
        // Codes of other widths cross the boundaries of words in some versions of the library, and
        // don't in others.
        if ![2, 4, 8].contains(&bits) {
            return Err(self.unreadable(t, &format!("compressed-tensors of {bits} bits")));
        }
        let scale = self.need("weight_scale")?;
        let groups = (scale.elements() as usize / rows.max(1)).max(1);
        // A first number of −1 says that the inputs were quantized in their order.
        let ordered = |t: &&Tensor| self.bytes(t).first_chunk() != Some(&(-1i32).to_le_bytes());
        let index = self.index(self.get("weight_g_idx").filter(ordered), cols, groups)?;
        let (scales, round) = self.scales(scale, rows * groups)?;
        let per_word = 32 / bits as usize;
        let zeros = match self.get("weight_zero_point") {
            Some(z) => {
                Zeros::DownRows(self.exact(z, &["I32"], rows.div_ceil(per_word) * groups)?)
            }
            None => Zeros::All(1 << (bits - 1)),
        };
        if !cols.is_multiple_of(groups) {
            return Err(
                self.wrong(&format!("tensor {} has {groups} groups for {cols} inputs", scale.name))
            );
        }
        Ok(self.matrix(
            t,
            Packed {
                name: match bits {
                    4 => "w4a16 (compressed-tensors)",
                    8 => "w8a16 (compressed-tensors)",
                    _ => "compressed-tensors",
                },
                rows,
                cols,
                bits,
                layout: Layout::AlongRow,
                levels: Levels::Unsigned,
                scales,
                factor: 1.0,
                divisor: 1.0,
                zeros,
                groups: Groups { rows: 1, cols: cols / groups, by_row: groups, by_group: 1, index },
                mask: None,
                round,
            },
        ))
    }

    /// The bits of a code: the first width in the configuration that fits the shape.
    fn bits(&self, rows: usize, cols: usize, words: usize) -> Option<u32> {
        let groups = self.config["config_groups"].as_object()?;
        let named =
            groups.values().filter_map(|g| g["weights"]["num_bits"].as_u64()).map(|b| b as u32);
        named.filter(|b| (1..=8).contains(b)).find(|b| {
            let dense = (cols * *b as usize).div_ceil(32);
            rows > 0 && (dense == words || cols.div_ceil(32 / *b as usize) == words)
        })
    }

    /// GPTQ: `qweight` `[cols · bits / 32, rows]`, `qzeros` `[groups, rows · bits / 32]`, `scales`
    /// `[groups, rows]`, `g_idx`.
    fn gptq(&self, t: &'a Tensor) -> Result<(Matrix<'a>, &'a Tensor)> {
        let format = self.config["checkpoint_format"].as_str().unwrap_or("gptq");
        let plus = match format {
            "gptq" => 1,
            "gptq_v2" => 0,
            other => return Err(self.unreadable(t, &format!("GPTQ, checkpoint_format {other}"))),
        };
        let (words, rows) = self.shape(t)?;
        let zeros = self.need("qzeros")?;
        // With `dynamic`, bits and groups differ from module to module: the shapes say what this
        // module has.
        let dynamic = self.config["dynamic"].as_object().is_some_and(|d| !d.is_empty());
        let bits = match dynamic {
            true => self.shape(zeros)?.1 * 32 / rows.max(1),
            false => self.config["bits"].as_u64().unwrap_or(0) as usize,
        };
        if ![2, 3, 4, 8].contains(&bits) {
            let by =
                if dynamic { " by its shapes (`dynamic` gives modules other bits)" } else { "" };
            return Err(self.unreadable(t, &format!("GPTQ of {bits} bits{by}")));
        }
        if !(words * 32).is_multiple_of(bits)
            || !(rows * bits).is_multiple_of(32)
            || t.type_name() != "I32"
        {
            return Err(self.wrong(&format!(
                "tensor {} is {} {:?}, which {bits} bits don't fit",
                t.name,
                t.type_name(),
                shown(t)
            )));
        }
        let cols = words * 32 / bits;
        let scale = self.need("scales")?;
        let groups = scale.elements() as usize / rows.max(1);
        let (scales, round) = self.scales(scale, rows * groups)?;
        let zeros = self.exact(zeros, &["I32"], groups * (rows * bits / 32))?;
        let index = self.index(self.get("g_idx"), cols, groups)?;
        let size = match self.config["group_size"].as_i64() {
            _ if dynamic => cols.div_ceil(groups.max(1)),
            Some(n) if n > 0 => n as usize,
            _ => cols,
        };
        if groups == 0 || cols.div_ceil(size) > groups {
            return Err(self.wrong(&format!(
                "tensor {} has {groups} groups for {cols} inputs, {size} a group",
                scale.name
            )));
        }
        Ok(self.matrix(
            t,
            Packed {
                name: ["GPTQ 2-bit", "GPTQ 3-bit", "GPTQ 4-bit", "GPTQ 8-bit"][match bits {
                    2 => 0,
                    3 => 1,
                    4 => 2,
                    _ => 3,
                }],
                rows,
                cols,
                bits: bits as u32,
                layout: Layout::DownColumn,
                levels: Levels::Unsigned,
                scales,
                factor: 1.0,
                divisor: 1.0,
                zeros: Zeros::Gptq { words: zeros, plus },
                groups: Groups { rows: 1, cols: size, by_row: 1, by_group: rows, index },
                mask: None,
                round,
            },
        ))
    }

    /// AWQ: `qweight` `[cols, rows / 8]`, `qzeros` `[groups, rows / 8]`, `scales` `[groups, rows]`.
    fn awq(&self, t: &'a Tensor) -> Result<(Matrix<'a>, &'a Tensor)> {
        let version = self.config["version"].as_str().unwrap_or("gemm");
        let bits = self.config["bits"].as_u64().unwrap_or(4);
        if !version.eq_ignore_ascii_case("gemm") || bits != 4 {
            return Err(self.unreadable(t, &format!("AWQ of {bits} bits, version {version}")));
        }
        let (cols, words) = self.shape(t)?;
        let rows = words * 8;
        self.exact(t, &["I32"], cols * words)?;
        let scale = self.need("scales")?;
        let groups = scale.elements() as usize / rows.max(1);
        let (scales, round) = self.scales(scale, rows * groups)?;
        let zeros = self.exact(self.need("qzeros")?, &["I32"], groups * words)?;
        if groups == 0 || !cols.is_multiple_of(groups) {
            return Err(
                self.wrong(&format!("tensor {} has {groups} groups for {cols} inputs", scale.name))
            );
        }
        Ok(self.matrix(
            t,
            Packed {
                name: "AWQ 4-bit",
                rows,
                cols,
                bits: 4,
                layout: Layout::Interleaved,
                levels: Levels::Unsigned,
                scales,
                factor: 1.0,
                divisor: 1.0,
                zeros: Zeros::Awq(zeros),
                groups: Groups {
                    rows: 1,
                    cols: cols / groups,
                    by_row: 1,
                    by_group: rows,
                    index: None,
                },
                mask: None,
                round,
            },
        ))
    }
}

/// A tensor's shape in Hugging Face's order.
fn shown(t: &Tensor) -> Vec<u64> {
    t.dims.iter().rev().copied().collect()
}
