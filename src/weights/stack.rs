//! Several matrices of one tensor, as experts are stored.

use super::{Matrix, Storage};

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
