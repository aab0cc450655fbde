//! The tensors of writers, and of experts.

use super::Model;
use crate::arch::{Experts, Role, Writer};
use crate::error::{Error, Result};
use crate::weights::{Matrix, Stack};

/// A tensor of a writer: most have one, experts that are stored apart have one each.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The tensor's name; of a packed matrix its module's, with `.weight`.
    pub tensor: String,
    /// Its matrices, `[hidden, width]` each.
    pub stack: Stack<'a>,
    /// Of the writer's matrices in order, the first that lies here. Expert `first + i` is
    /// `stack.get(i)`.
    pub first: usize,
}

impl Part<'_> {
    /// The part's share of a gate over all columns of the writer.
    pub fn gate<'v>(&self, v: &'v [f32]) -> &'v [f32] {
        let width = self.stack.shape().1;
        &v[self.first * width..(self.first + self.stack.len()) * width]
    }
}

impl Model {
    /// The matrix of one expert of a block. `role`: `ExpertGate`, `ExpertUp` or `ExpertDown`.
    ///
    /// # Errors
    /// A tensor that is missing or can't be read.
    pub fn expert(&self, role: Role, layer: usize, expert: usize) -> Result<Matrix<'_>> {
        let Some((name, share, of)) = self.stack_of(role, layer) else {
            return self
                .matrix_named(&format!("{}.weight", self.names.expert(role, layer, expert)));
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
                    .map(|e| {
                        part(format!("{}.weight", self.names.expert(Role::ExpertDown, layer, e)), e)
                    })
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
            let (found, asked) = ((stack.len(), shape.0, shape.1), (e.count, of * rows, cols));
            if found != asked {
                let shown =
                    |(n, rows, cols): (usize, usize, usize)| format!("{n} x {rows} x {cols}");
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
