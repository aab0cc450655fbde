//! The output matrix: which tensor holds it, and the error for a damaged one.

use super::Model;
use crate::error::{Error, Result};
use crate::weights::Matrix;

impl Model {
    /// The output matrix, `[vocab, hidden]`: the embedding in tied models.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn output(&self) -> Result<Matrix<'_>> {
        match self.spec.tied {
            true => self.embedding(),
            false => self.matrix_named(self.names.output()),
        }
    }

    /// Unties a model whose folder holds an output matrix that differs from the embedding, although
    /// config.json ties the two. Merging an adapter that changes `lm_head` leaves such folders.
    /// Transformers runs the folder's own output matrix, as is done here. Other runtimes run the
    /// embedding, so this adds a warning.
    pub(super) fn untie(&mut self) -> Result<()> {
        let Some(folder) = self.file.folder().filter(|_| self.spec.tied) else { return Ok(()) };
        let (head, embedding) = (self.names.output().to_string(), self.names.embedding());
        let (Some(a), Some(b)) = (folder.tensor(&head), folder.tensor(&embedding)) else {
            return Ok(());
        };
        let same = match (a.type_id, &a.dims) == (b.type_id, &b.dims) {
            true => folder.bytes(a) == folder.bytes(b),
            false => a.dims == b.dims && same_rows(&self.matrix_named(&head)?, &self.embedding()?),
        };
        [a, b].into_iter().for_each(|t| self.file.advise_dont_need(t));
        if !same {
            self.spec.tied = false;
            self.warnings.push(format!(
                "{}: config.json ties the output matrix to the embedding (tie_word_embeddings), \
                 but {head} and {embedding} differ; {head} is run, as in transformers, while vLLM \
                 runs {embedding}. Correct config.json, or remove {head}",
                self.file.path().display()
            ));
        }
        Ok(())
    }

    /// The error for an output matrix that gives logits that are not finite. It names the first
    /// damaged row, if there is one.
    ///
    /// # Errors
    /// The tensor is missing or can't be read.
    pub fn output_damaged(&self) -> Result<Error> {
        let matrix = self.output()?;
        let mut row = vec![0.0; matrix.cols];
        let damaged = (0..matrix.rows).find(|&r| {
            matrix.decode_row(r, &mut row);
            row.iter().any(|x| !x.is_finite())
        });
        let name =
            if self.spec.tied { self.names.embedding() } else { self.names.output().to_string() };
        let what = match damaged {
            Some(r) => format!(
                "row {r} of tensor {name} (the output matrix) holds numbers that are not finite"
            ),
            None => format!("tensor {name} (the output matrix) gives logits that are not finite"),
        };
        Ok(Error::Model(format!(
            "{}: {what}; the weights are damaged: download the file again, or have it quantized \
             again",
            self.path()
        )))
    }
}

/// Whether two matrices of the same shape decode to the same numbers.
fn same_rows(a: &Matrix, b: &Matrix) -> bool {
    let [mut x, mut y] = [a, b].map(|m| vec![0.0; m.cols]);
    (0..a.rows).all(|r| {
        a.decode_row(r, &mut x);
        b.decode_row(r, &mut y);
        x == y
    })
}
