//! Tensors that hold several matrices: the experts of a block, one behind the other.

use super::{Experts, Matrix, Model, Names, Role, Storage, Writer};
use crate::error::{Error, Result};

/// The matrices of a tensor, of equal shape and encoding: one, or one an expert.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a> {
    /// All of them: the shape of one, the bytes of all.
    all: Matrix<'a>,
    count: usize,
}

impl<'a> From<Matrix<'a>> for Stack<'a> {
    fn from(all: Matrix<'a>) -> Stack<'a> {
        Stack { all, count: 1 }
    }
}

impl<'a> Stack<'a> {
    /// `all`: the shape of one matrix, and the bytes of `count`.
    pub fn new(all: Matrix<'a>, count: usize) -> Stack<'a> {
        Stack { all, count }
    }

    /// How many matrices there are.
    #[allow(clippy::len_without_is_empty)] // A tensor without any is no stack.
    pub fn len(&self) -> usize {
        self.count
    }

    /// The `i`-th matrix.
    pub fn get(&self, i: usize) -> Matrix<'a> {
        if self.count == 1 {
            return self.all;
        }
        let size = self.all.bytes.len() / self.count;
        Matrix { bytes: &self.all.bytes[i * size..(i + 1) * size], ..self.all }
    }

    /// Rows and columns of each.
    pub fn shape(&self) -> (usize, usize) {
        (self.all.rows, self.all.cols)
    }

    /// How they are stored.
    pub fn encoding(&self) -> Storage<'a> {
        self.all.encoding
    }

    /// Matrices of the same shape with other bytes.
    pub fn with<'b>(&self, encoding: Storage<'b>, bytes: &'b [u8]) -> Stack<'b> {
        Stack { all: Matrix { encoding, bytes, ..self.all }, count: self.count }
    }

    /// One after the other.
    pub fn iter(&self) -> impl Iterator<Item = Matrix<'a>> + '_ {
        (0..self.count).map(|i| self.get(i))
    }
}

/// A tensor of a writer: most have one, experts that are stored apart have one each.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The tensor's name; of a packed matrix its module's, with `.weight`.
    pub tensor: String,
    /// Its matrices, `[hidden, width]` each.
    pub stack: Stack<'a>,
    /// Of the writer's matrices in order, the first that lies here. Expert `first + i` is `stack.get(i)`.
    pub first: usize,
}

impl Part<'_> {
    /// The part's share of a gate over all columns of the writer.
    pub fn gate<'v>(&self, v: &'v [f32]) -> &'v [f32] {
        let width = self.stack.all.cols;
        &v[self.first * width..(self.first + self.stack.len()) * width]
    }
}

impl Names {
    /// The tensor in which a role's experts are stacked, and which share of its rows is the role's: (index, of so many).
    fn stacked(&self, role: Role, layer: usize) -> [(String, usize, usize); 2] {
        let block = self.block(layer);
        let half = usize::from(role == Role::ExpertUp);
        match self {
            Names::Gguf => [
                (format!("{}.weight", self.module(role, layer)), 0, 1),
                (format!("{block}ffn_gate_up_exps.weight"), half, 2),
            ],
            Names::HuggingFace { moe, .. } => [
                (format!("{block}{moe}.experts.{}", moe_proj(role)), 0, 1),
                (format!("{block}{moe}.experts.gate_up_proj"), half, 2),
            ],
        }
    }

    /// Whether a tensor is one of a block's writer.
    pub fn is_writer(&self, tensor: &str, layer: usize, writer: Writer) -> bool {
        let Some(rest) = tensor.strip_prefix(&self.block(layer)) else { return false };
        match self {
            Names::HuggingFace { moe, .. } if writer == Writer::Experts => {
                let of = rest.strip_prefix(moe).and_then(|r| r.strip_prefix(".experts."));
                of.is_some_and(|r| {
                    r == "down_proj" || r.ends_with(".down_proj.weight") || r.ends_with(".w2.weight")
                })
            }
            _ => tensor == format!("{}.weight", self.module(writer.role(), layer)),
        }
    }

    /// The module of one expert, where each has modules of its own (Hugging Face).
    pub(super) fn expert(&self, role: Role, layer: usize, expert: usize) -> String {
        let Names::HuggingFace { moe, .. } = self else { return self.module(role, layer) };
        let name = match (*moe, role) {
            ("block_sparse_moe", Role::ExpertGate) => "w1",
            ("block_sparse_moe", Role::ExpertUp) => "w3",
            ("block_sparse_moe", _) => "w2",
            _ => moe_proj(role),
        };
        format!("{}{moe}.experts.{expert}.{name}", self.block(layer))
    }
}

fn moe_proj(role: Role) -> &'static str {
    match role {
        Role::ExpertGate => "gate_proj",
        Role::ExpertUp => "up_proj",
        _ => "down_proj",
    }
}

impl Model {
    /// The matrix of one expert of a block. `role`: `ExpertGate`, `ExpertUp` or `ExpertDown`.
    ///
    /// # Errors
    /// A tensor that is missing or can't be read.
    pub fn expert(&self, role: Role, layer: usize, expert: usize) -> Result<Matrix<'_>> {
        let Some((name, share, of)) = self.stack_of(role, layer) else {
            return self.matrix_named(&format!("{}.weight", self.names.expert(role, layer, expert)));
        };
        let w = self.stack(&name)?.get(expert);
        let rows = w.rows / of;
        let size = w.bytes.len() / of;
        Ok(Matrix { rows, bytes: &w.bytes[share * size..(share + 1) * size], ..w })
    }

    fn stack_of(&self, role: Role, layer: usize) -> Option<(String, usize, usize)> {
        let fits = |(name, _, of): &(String, usize, usize)| {
            (*of == 1 || role != Role::ExpertDown) && self.file.tensor(name).is_some()
        };
        self.names.stacked(role, layer).into_iter().find(fits)
    }

    /// The tensors of a writer: one, or one for each expert that is stored apart.
    ///
    /// # Errors
    /// A tensor that is missing or can't be read.
    pub fn parts(&self, layer: usize, writer: Writer) -> Result<Vec<Part<'_>>> {
        let part = |tensor: String, first| -> Result<Part> {
            Ok(Part { stack: self.stack(&tensor)?, tensor, first })
        };
        if let (Writer::Experts, Some(experts)) = (writer, &self.spec.experts) {
            return match self.stack_of(Role::ExpertDown, layer) {
                Some((tensor, ..)) => Ok(vec![part(tensor, 0)?]),
                None => (0..experts.count)
                    .map(|e| part(format!("{}.weight", self.names.expert(Role::ExpertDown, layer, e)), e))
                    .collect(),
            };
        }
        Ok(vec![part(self.name(writer.role(), layer), 0)?])
    }

    /// Checks the tensors of a block that routes to experts.
    pub(super) fn check_experts(&self, layer: usize, e: &Experts) -> Result<()> {
        let d = self.spec.hidden;
        self.expect(&self.name(Role::Router, layer), e.count, d)?;
        for (role, rows, cols) in
            [(Role::ExpertGate, e.ffn, d), (Role::ExpertUp, e.ffn, d), (Role::ExpertDown, d, e.ffn)]
        {
            let Some((name, _, of)) = self.stack_of(role, layer) else {
                for i in 0..e.count {
                    self.expect(&format!("{}.weight", self.names.expert(role, layer, i)), rows, cols)?;
                }
                continue;
            };
            let stack = self.stack(&name)?;
            let (found, asked) = ((stack.len(), stack.all.rows, stack.all.cols), (e.count, of * rows, cols));
            if found != asked {
                let shown = |(n, rows, cols): (usize, usize, usize)| format!("{n} x {rows} x {cols}");
                return Err(Error::Model(format!(
                    "{}: tensor {name} is {} (experts, outputs, inputs), but {} asks for {}",
                    self.path(),
                    shown(found),
                    self.description(),
                    shown(asked)
                )));
            }
        }
        if e.shared > 0 {
            self.expect(&self.name(Role::SharedGate, layer), e.shared, d)?;
            self.expect(&self.name(Role::SharedUp, layer), e.shared, d)?;
            self.expect(&self.name(Role::SharedDown, layer), d, e.shared)?;
            let name = self.name(Role::SharedRouter, layer);
            self.expect_len(&name, self.vector(Role::SharedRouter, layer)?.len(), d)?;
        }
        Ok(())
    }
}
