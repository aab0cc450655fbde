//! A model: a checkpoint, its description, and access to its tensors by role. Opening a model
//! checks its tensors.

mod check;
mod head;
mod post_norm;
mod stack;

use std::path::Path;

use crate::arch::{Names, Role, Spec, Writer};
use crate::checkpoint::{type_name, Checkpoint, Tensor};
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::packing;
use crate::weights::{Matrix, Stack, Storage};

pub use post_norm::PostNorm;
pub use stack::Part;

/// New bytes of a tensor, which are read in place of the file's.
#[derive(Clone, Debug)]
pub struct Replacement {
    /// The name of the tensor. For a packed matrix: the tensor that holds the codes.
    pub tensor: String,
    /// The new encoding; `None` if it is the file's.
    pub encoding: Option<Encoding>,
    /// The new bytes.
    pub bytes: Vec<u8>,
}

/// A checkpoint with its description.
pub struct Model {
    /// The mapped file or folder.
    pub file: Checkpoint,
    /// The description of the decoder.
    pub spec: Spec,
    /// The names of the tensors.
    pub names: Names,
    /// Tensors that are read from memory in place of the file: a patch that is measured before it
    /// is written.
    pub replaced: Vec<Replacement>,
    /// Warnings that the user must see before anything is measured.
    pub warnings: Vec<String>,
}

impl Model {
    /// Opens a checkpoint. Checks that every tensor of the forward pass is there, with the shape
    /// that follows from the metadata and in an encoding that can be read, and that no tensor of a
    /// block would be left out.
    ///
    /// # Errors
    /// The errors of [`Checkpoint::open`]; an architecture or encoding isn't supported; a tensor is
    /// missing, has another shape, or can't be applied.
    pub fn open(path: &Path) -> Result<Model> {
        let file = Checkpoint::open(path)?;
        let spec = Spec::of(&file)?;
        let names = Names::of(&file);
        let mut model = Model { file, spec, names, replaced: Vec::new(), warnings: Vec::new() };
        model.untie()?;
        model.check()?;
        Ok(model)
    }

    /// The same model, with the tensors of `replaced` read from memory.
    ///
    /// # Errors
    /// The checkpoint can't be opened again.
    pub fn with(&self, replaced: Vec<Replacement>) -> Result<Model> {
        let file = Checkpoint::open(self.file.path())?;
        let (spec, names) = (self.spec.clone(), self.names.clone());
        Ok(Model { file, spec, names, replaced, warnings: Vec::new() })
    }

    /// The name of a role's tensor in block `layer`.
    pub fn name(&self, role: Role, layer: usize) -> String {
        self.names.tensor(role, layer)
    }

    /// The matrix of a role in block `layer`.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn matrix(&self, role: Role, layer: usize) -> Result<Matrix<'_>> {
        self.matrix_named(&self.name(role, layer))
    }

    /// The stored vector of a role in block `layer`, such as a norm's weight.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn vector(&self, role: Role, layer: usize) -> Result<Vec<f32>> {
        let name = self.name(role, layer);
        self.vector_named(&name)?.ok_or_else(|| self.missing(&name))
    }

    /// A norm's weight, by which the forward pass multiplies: the stored weight plus
    /// [`Spec::norm_offset`].
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn norm(&self, role: Role, layer: usize) -> Result<Vec<f32>> {
        Ok(self.with_norm_offset(self.vector(role, layer)?))
    }

    fn with_norm_offset(&self, mut weight: Vec<f32>) -> Vec<f32> {
        if self.spec.norm_offset != 0.0 {
            weight.iter_mut().for_each(|w| *w += self.spec.norm_offset);
        }
        weight
    }

    /// Whether block `layer` has a matrix of this role. Checkpoints differ in which projections
    /// they fuse.
    ///
    /// # Errors
    /// The packing can't be read.
    pub fn has(&self, role: Role, layer: usize) -> Result<bool> {
        let name = self.name(role, layer);
        Ok(self.file.tensor(&name).is_some() || self.packed(&name)?.is_some())
    }

    /// The name of a role's bias in block `layer`.
    pub fn bias_name(&self, role: Role, layer: usize) -> String {
        format!("{}.bias", self.names.module(role, layer))
    }

    /// The bias of a role in block `layer`; `None` if the checkpoint has none.
    ///
    /// # Errors
    /// The tensor can't be read.
    pub fn bias(&self, role: Role, layer: usize) -> Result<Option<Vec<f32>>> {
        self.vector_named(&self.bias_name(role, layer))
    }

    /// Tells the operating system that the tensors of block `layer` aren't needed soon, and that
    /// those of the next block are. After the last block comes the first.
    pub fn release(&self, layer: usize) {
        let next = self.names.block((layer + 1) % self.spec.layers);
        let this = self.names.block(layer);
        for t in self.file.tensors() {
            if t.name.starts_with(&this) {
                self.file.advise_dont_need(t);
            } else if t.name.starts_with(&next) {
                self.file.advise_will_need(t);
            }
        }
    }

    /// The token embedding, `[vocab, hidden]`.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn embedding(&self) -> Result<Matrix<'_>> {
        self.matrix_named(&self.names.embedding())
    }

    /// The factor of the whole residual stream after block `layer`; 1 if the block has none.
    ///
    /// # Errors
    /// The tensor can't be read, or doesn't hold one number other than 0.
    pub fn output_scale(&self, layer: usize) -> Result<f32> {
        if !self.spec.output_scale {
            return Ok(1.0);
        }
        let name = self.name(Role::OutputScale, layer);
        match self.vector_named(&name)?.as_deref() {
            None => Ok(1.0),
            Some(&[scale]) if scale.is_finite() && scale != 0.0 => Ok(scale),
            Some(found) => Err(Error::Model(format!(
                "{}: tensor {name} holds {found:?}, expected one number other than 0",
                self.path()
            ))),
        }
    }

    /// The factor of each expert's output in block `layer`; `None` if the block has none.
    ///
    /// # Errors
    /// The tensor can't be read.
    pub fn expert_scales(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        self.vector_named(&self.name(Role::ExpertScale, layer))
    }

    /// The table of per-layer embeddings, `[tokens, layers * width]`, and the matrix that projects
    /// a token's embedding to the same width.
    ///
    /// # Errors
    /// A tensor is missing or can't be read.
    pub fn per_layer(&self) -> Result<[Matrix<'_>; 2]> {
        let [table, projection, _] = self.names.per_layer();
        Ok([self.matrix_named(&table)?, self.matrix_named(&projection)?])
    }

    /// The weight of the norm of projected embeddings, `[width]`.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn per_layer_norm(&self) -> Result<Vec<f32>> {
        let [_, _, name] = self.names.per_layer();
        let stored = self.vector_named(&name)?.ok_or_else(|| self.missing(&name))?;
        Ok(self.with_norm_offset(stored))
    }

    /// The final norm's weight, `[hidden]`.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn output_norm(&self) -> Result<Vec<f32>> {
        let name = self.names.output_norm();
        let stored = self.vector_named(&name)?.ok_or_else(|| self.missing(&name))?;
        Ok(self.with_norm_offset(stored))
    }

    /// The tensor's name and the matrix of a writer that has a single matrix.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn writer(&self, layer: usize, writer: Writer) -> Result<(String, Matrix<'_>)> {
        let name = self.name(writer.role(), layer);
        let matrix = self.matrix_named(&name)?;
        Ok((name, matrix))
    }

    /// The matrix in a tensor of any name.
    ///
    /// # Errors
    /// The tensor is missing, can't be read, or holds several matrices.
    pub fn matrix_named(&self, name: &str) -> Result<Matrix<'_>> {
        let stack = self.stack(name)?;
        if self.file.tensor(name).is_some_and(|t| t.dims.len() > 2) {
            return Err(self.dimensions(name, "2"));
        }
        Ok(stack.get(0))
    }

    /// All matrices of a tensor. A packed matrix is named by its module, with `.weight`.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn stack(&self, name: &str) -> Result<Stack<'_>> {
        if let Some((matrix, codes)) = self.packed(name)? {
            let new = self.replaced.iter().find(|r| r.tensor == codes.name);
            return Ok(Stack::new(
                Matrix { bytes: new.map_or(matrix.bytes, |r| &r.bytes), ..matrix },
                1,
            ));
        }
        if let Some((stack, codes)) = self.packed_experts(name)? {
            let new = self.replaced.iter().find(|r| r.tensor == codes.name);
            return Ok(new.map_or(stack, |r| stack.with(stack.encoding(), &r.bytes)));
        }
        let t = self.file.tensor(name).ok_or_else(|| self.missing(name))?;
        let encoding = Encoding::from_ggml(t.type_id).ok_or_else(|| {
            Error::unsupported(
                format!(
                    "{}: tensor {name} has type {}, which can't be read",
                    self.path(),
                    type_name(t.type_id)
                ),
                match self.file {
                    Checkpoint::Gguf(_) => {
                        "quantize the model to another type, such as Q4_K_M, Q8_0 or F16"
                    }
                    Checkpoint::Folder(_) => {
                        "use a checkpoint of the same model in another packing"
                    }
                },
            )
        })?;
        let (cols, rows, count) = match t.dims[..] {
            [cols, rows] => (cols as usize, rows as usize, 1),
            [cols, rows, count] if count > 0 => (cols as usize, rows as usize, count as usize),
            _ => return Err(self.dimensions(name, "2 or 3")),
        };
        if !cols.is_multiple_of(encoding.block_len()) {
            return Err(Error::Model(format!(
                "{}: tensor {name} has rows of {cols}, {} needs multiples of {}",
                self.path(),
                encoding.name(),
                encoding.block_len()
            )));
        }
        let replaced = self.replaced.iter().find(|r| r.tensor == name);
        let by_input = self.spec.experts.as_ref().is_some_and(|e| e.alternating);
        if by_input && t.dims.len() == 3 && encoding.block_len() == 1 {
            // The dimensions of a matrix change places.
            let stack = packing::by_input(encoding, (cols, rows), count, self.file.bytes(t));
            return Ok(replaced.map_or(stack, |r| {
                stack.with(r.encoding.map_or(stack.encoding(), Storage::from), &r.bytes)
            }));
        }
        let all = match replaced {
            Some(r) => Matrix {
                rows,
                cols,
                encoding: r.encoding.unwrap_or(encoding).into(),
                bytes: &r.bytes,
            },
            None => Matrix { rows, cols, encoding: encoding.into(), bytes: self.file.bytes(t) },
        };
        Ok(Stack::new(all, count))
    }

    fn dimensions(&self, name: &str, expected: &str) -> Error {
        let dims = self.file.tensor(name).map_or(&[][..], |t| &t.dims);
        Error::Model(format!(
            "{}: tensor {name} has the shape {dims:?}, expected {expected} dimensions",
            self.path()
        ))
    }

    /// The name of the tensor that holds a matrix's codes: `name` itself, unless the matrix is
    /// packed.
    ///
    /// # Errors
    /// The packing can't be read.
    pub fn code_tensor(&self, name: &str) -> Result<String> {
        if let Some((_, codes)) = self.packed_experts(name)? {
            return Ok(codes.name.clone());
        }
        Ok(self.packed(name)?.map_or(name.to_string(), |(_, codes)| codes.name.clone()))
    }

    /// A stack of packed experts and the tensor that holds its codes; `None` for another tensor.
    fn packed_experts(&self, name: &str) -> Result<Option<(Stack<'_>, &Tensor)>> {
        self.file.folder().map_or(Ok(None), |folder| packing::packed_experts(folder, name))
    }

    /// A packed matrix and the tensor that holds its codes; `None` if the matrix isn't packed.
    fn packed(&self, name: &str) -> Result<Option<(Matrix<'_>, &Tensor)>> {
        let Checkpoint::Folder(folder) = &self.file else { return Ok(None) };
        name.strip_suffix(".weight").map_or(Ok(None), |module| packing::find(folder, module))
    }

    /// The vector in a tensor; `None` if the checkpoint has no such tensor.
    fn vector_named(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(t) = self.file.tensor(name) else { return Ok(None) };
        let encoding =
            Encoding::from_ggml(t.type_id).filter(|e| e.block_len() == 1).ok_or_else(|| {
                Error::unsupported(
                    format!("{}: vector {name} has type {}", self.path(), type_name(t.type_id)),
                    "norms and biases must be F32, F16 or BF16",
                )
            })?;
        let n: u64 = t.dims.iter().product();
        let mut out = vec![0.0; n as usize];
        encoding.decode(self.file.bytes(t), &mut out);
        Ok(Some(out))
    }

    fn path(&self) -> String {
        self.file.path().display().to_string()
    }

    /// The part of the checkpoint that determines the shapes, for messages.
    fn description(&self) -> &'static str {
        match self.file {
            Checkpoint::Gguf(_) => "the metadata",
            Checkpoint::Folder(_) => "config.json",
        }
    }

    /// The error for a missing tensor: the index is wrong, the packing is unknown, or the tensor
    /// isn't there.
    fn missing(&self, name: &str) -> Error {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let absent = self.file.folder().map_or(&[][..], |f| f.absent());
        let of_module =
            |(n, _): &&(String, String)| n.strip_prefix(module).is_some_and(|r| r.starts_with('.'));
        if let Some((tensor, file)) = absent.iter().find(of_module) {
            return Error::Model(format!(
                "{}: the index says that tensor {tensor} is in {file}, where it is not; download \
                 both files again",
                self.path()
            ));
        }
        let folder = self.file.folder().zip(name.strip_suffix(".weight"));
        if let Some(found) = folder.and_then(|(f, module)| packing::unknown(f, module)) {
            return Error::unsupported(
                format!(
                    "{}: {name} is packed in a way that can't be read (found: {found})",
                    self.path()
                ),
                "use a checkpoint of the same model in another packing, or its GGUF file",
            );
        }
        Error::Model(format!(
            "{}: tensor {name} is missing; {} with {} blocks needs it",
            self.path(),
            self.spec.arch,
            self.spec.layers
        ))
    }
}
