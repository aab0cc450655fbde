//! Several matrices in one tensor, as the experts of a block are often stored.

use super::{Matrix, Storage};

/// The matrices of a tensor, all of the same shape and encoding: a single one, or one per expert.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a> {
    /// The shape of one matrix, with the bytes of all, and the scales of all if it is packed.
    all: Matrix<'a>,
    count: usize,
}

impl<'a> From<Matrix<'a>> for Stack<'a> {
    fn from(all: Matrix<'a>) -> Stack<'a> {
        Stack { all, count: 1 }
    }
}

impl<'a> Stack<'a> {
    /// A stack of `count` matrices. `all` has the shape of one matrix and the bytes of all.
    pub fn new(all: Matrix<'a>, count: usize) -> Stack<'a> {
        Stack { all, count }
    }

    /// How many matrices there are.
    #[allow(clippy::len_without_is_empty)] // A stack is never empty.
    pub fn len(&self) -> usize {
        self.count
    }

    /// The `i`-th matrix.
    pub fn get(&self, i: usize) -> Matrix<'a> {
        if self.count == 1 {
            return self.all;
        }
        let size = self.all.bytes.len() / self.count;
        let encoding = self.all.encoding.of_stack(i, self.count);
        Matrix { bytes: &self.all.bytes[i * size..(i + 1) * size], encoding, ..self.all }
    }

    /// Rows and columns of each matrix.
    pub fn shape(&self) -> (usize, usize) {
        (self.all.rows, self.all.cols)
    }

    /// How the matrices are stored; if they are packed, with the scales of all.
    pub fn encoding(&self) -> Storage<'a> {
        self.all.encoding
    }

    /// A stack of the same shape and count, with another encoding and other bytes.
    pub fn with<'b>(&self, encoding: Storage<'b>, bytes: &'b [u8]) -> Stack<'b> {
        Stack { all: Matrix { encoding, bytes, ..self.all }, count: self.count }
    }

    /// The matrices in order.
    pub fn iter(&self) -> impl Iterator<Item = Matrix<'a>> + '_ {
        (0..self.count).map(|i| self.get(i))
    }
}
