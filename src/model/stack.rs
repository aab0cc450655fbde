//! The tensors of writers and of experts.

use super::Model;
use crate::arch::{Experts, Role, Writer};
use crate::error::{Error, Result};
use crate::weights::{Matrix, Stack};

/// One tensor of a writer. Most writers have one tensor; experts that are stored apart have one
/// each.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The tensor's name. For a packed matrix: the module's name with `.weight`.
    pub tensor: String,
    /// The tensor's matrices, `[hidden, width]` each.
    pub stack: Stack<'a>,
    /// Index of the tensor's first matrix among the writer's matrices: expert `first + i` is
    /// `stack.get(i)`.
    pub first: usize,
}

impl Part<'_> {
    /// The slice of the gate `v` over this tensor's columns. `v` spans all columns of the writer.
    pub fn gate<'v>(&self, v: &'v [f32]) -> &'v [f32] {
        let width = self.stack.shape().1;
        &v[self.first * width..(self.first + self.stack.len()) * width]
    }
}

impl Model {
    /// The matrix of one expert in block `layer`. `role`: one of the experts' matrices.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn expert(&self, role: Role, layer: usize, expert: usize) -> Result<Matrix<'_>> {
        let Some((name, part, parts)) = self.stack_of(role, layer) else {
            return self
                .matrix_named(&format!("{}.weight", self.names.expert(role, layer, expert)));
        };
        let w = self.stack(&name)?.get(expert);
        if parts == 1 {
            return Ok(w);
        }
        let rows = w.rows / parts;
        let size = w.bytes.len() / parts;
        Ok(Matrix { rows, bytes: &w.bytes[part * size..(part + 1) * size], ..w })
    }

    /// The tensor in which the experts of a role are stacked, as
    /// [`Names::stacked`](crate::arch::Names::stacked) gives it. `None` if the checkpoint stores
    /// experts apart.
    fn stack_of(&self, role: Role, layer: usize) -> Option<(String, usize, usize)> {
        let fits = |(name, _, parts): &(String, usize, usize)| {
            let exists = |name: &str| self.file.tensor(name).is_some();
            (*parts == 1 || role != Role::ExpertDown)
                && (exists(name) || exists(&format!("{name}_blocks")))
        };
        self.names.stacked(role, layer).into_iter().find(fits)
    }

    /// The biases of a role of all experts in block `layer`, side by side. `None` for experts
    /// without biases.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn expert_biases(&self, role: Role, layer: usize) -> Result<Option<Vec<f32>>> {
        if !self.spec.experts.as_ref().is_some_and(|e| e.biased) {
            return Ok(None);
        }
        let name = self.names.expert_biases(role, layer);
        self.vector_named(&name)?.ok_or_else(|| self.missing(&name)).map(Some)
    }

    /// The tensors of a writer in block `layer`: one, or one for each expert if experts are stored
    /// apart.
    ///
    /// # Errors
    /// A tensor is missing or can't be read.
    pub fn parts(&self, layer: usize, writer: Writer) -> Result<Vec<Part<'_>>> {
        let part = |tensor: String, first| -> Result<Part> {
            Ok(Part { stack: self.stack(&tensor)?, tensor, first })
        };
        if let (Writer::Experts, Some(experts)) = (writer, &self.spec.experts) {
            return match self.stack_of(Role::ExpertDown, layer) {
                Some((tensor, ..)) => Ok(vec![part(tensor, 0)?]),
                None => (0..experts.count)
                    .map(|e| {
                        part(format!("{}.weight", self.names.expert(Role::ExpertDown, layer, e)), e)
                    })
                    .collect(),
            };
        }
        Ok(vec![part(self.name(writer.role(), layer), 0)?])
    }

    /// Checks the shapes of the router and the experts of block `layer`.
    pub(super) fn check_experts(&self, layer: usize, e: &Experts) -> Result<()> {
        let d = self.spec.hidden;
        self.expect(&self.name(Role::Router, layer), e.count, d)?;
        if e.sigmoid {
            let name = self.name(Role::RouterCorrection, layer);
            let correction = self.vector(Role::RouterCorrection, layer)?;
            self.expect_len(&name, correction.len(), e.count)?;
        }
        if e.biased {
            let name = self.bias_name(Role::Router, layer);
            let bias = self.bias(Role::Router, layer)?.ok_or_else(|| self.missing(&name))?;
            self.expect_len(&name, bias.len(), e.count)?;
        }
        for &role in e.roles() {
            let (rows, cols) = match role {
                Role::ExpertDown => (d, e.ffn),
                Role::ExpertGateUp => (2 * e.ffn, d),
                _ => (e.ffn, d),
            };
            if let Some(biases) = self.expert_biases(role, layer)? {
                let name = self.names.expert_biases(role, layer);
                self.expect_len(&name, biases.len(), e.count * rows)?;
            }
            let Some((name, _, parts)) = self.stack_of(role, layer) else {
                for i in 0..e.count {
                    self.expect(
                        &format!("{}.weight", self.names.expert(role, layer, i)),
                        rows,
                        cols,
                    )?;
                }
                continue;
            };
            let stack = self.stack(&name)?;
            let shape = stack.shape();
            let found = (stack.len(), shape.0, shape.1);
            let expected = (e.count, parts * rows, cols);
            if found != expected {
                let shown =
                    |(n, rows, cols): (usize, usize, usize)| format!("{n} x {rows} x {cols}");
                return Err(Error::Model(format!(
                    "{}: tensor {name} is {} (experts, outputs, inputs), but {} asks for {}",
                    self.path(),
                    shown(found),
                    self.description(),
                    shown(expected)
                )));
            }
        }
        if e.parallel {
            let name = self.name(Role::RouterScale, layer);
            self.expect_len(&name, self.vector(Role::RouterScale, layer)?.len(), d)?;
            if let Some(scales) = self.expert_scales(layer)? {
                self.expect_len(&self.name(Role::ExpertScale, layer), scales.len(), e.count)?;
            }
        }
        if e.shared > 0 {
            self.expect(&self.name(Role::SharedGate, layer), e.shared, d)?;
            self.expect(&self.name(Role::SharedUp, layer), e.shared, d)?;
            self.expect(&self.name(Role::SharedDown, layer), d, e.shared)?;
        }
        if e.shared > 0 && e.shared_gated {
            let name = self.name(Role::SharedRouter, layer);
            self.expect_len(&name, self.vector(Role::SharedRouter, layer)?.len(), d)?;
        }
        Ok(())
    }
}
