//! The output matrix: which tensor it is, and what to say where it is damaged.

use super::Model;
use crate::error::{Error, Result};
use crate::weights::Matrix;

impl Model {
    /// The output matrix, `[vocab, hidden]`; tied models use the embedding.
    pub fn output(&self) -> Result<Matrix<'_>> {
        match self.spec.tied {
            true => self.embedding(),
            false => self.matrix_named(self.names.output()),
        }
    }

    /// Runs a folder's own output matrix where config.json ties it to the embedding and the two
    /// differ, as transformers does. Merging an adapter over `lm_head` leaves such folders. Other
    /// runtimes tie, so the user is warned.
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
                "{}: config.json ties the output matrix to the embedding (tie_word_embeddings), but \
                 {head} and {embedding} differ; {head} is run, as in transformers, while vLLM runs \
                 {embedding}. Correct config.json, or remove {head}",
                self.file.path().display()
            ));
        }
        Ok(())
    }

    /// What to say where the output matrix gives logits that are not finite.
    ///
    /// # Errors
    /// A tensor that is missing or can't be read.
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
            Some(r) => {
                format!("row {r} of tensor {name} (the output matrix) holds numbers that are not finite")
            }
            None => format!("tensor {name} (the output matrix) gives logits that are not finite"),
        };
        Ok(Error::Model(format!(
            "{}: {what}; the weights are damaged: download the file again, or have it quantized anew",
            self.path()
        )))
    }
}

/// Whether two matrices of one shape hold the same numbers in different encodings.
fn same_rows(a: &Matrix, b: &Matrix) -> bool {
    let [mut x, mut y] = [a, b].map(|m| vec![0.0; m.cols]);
    (0..a.rows).all(|r| {
        a.decode_row(r, &mut x);
        b.decode_row(r, &mut y);
        x == y
    })
}
