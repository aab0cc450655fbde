//! Products with stored matrices, on the CPU or on a GPU.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::product::{product, Arithmetic};
use super::work::Work;
use crate::error::{Error, Result};
use crate::progress::Cancel;
use crate::weights::Matrix;

/// Elements of a decoded tile: 16 MiB of f32.
const TILE: usize = 4 << 20;
/// Rows of a tile on the CPU: a multiple, whatever the number of columns.
const ROWS: usize = 1024;

/// Where matrix products run.
#[derive(Clone)]
pub struct Compute {
    device: Device,
    arithmetic: Arithmetic,
    cancel: Cancel,
    work: Arc<Work>,
}

impl Compute {
    /// `auto` (a GPU that this binary was built for, else the CPU), `cpu`, `cuda`, `cuda:N` or
    /// `metal`.
    ///
    /// # Errors
    /// An unknown name, a device that this binary was not built for, or one that is not there.
    pub fn new(name: &str) -> Result<Compute> {
        let gone = |e: candle_core::Error| {
            let text = e.to_string();
            let line = text.lines().next().unwrap_or_default().to_string();
            Error::unsupported(
                format!("device {name} can't be used: {line}"),
                "use `device` cpu, or a build with the feature cuda or metal",
            )
        };
        let device = match name.split_once(':').unwrap_or((name, "0")) {
            ("cpu", "0") => Device::Cpu,
            ("auto", "0") => {
                Device::new_cuda(0).or_else(|_| Device::new_metal(0)).unwrap_or(Device::Cpu)
            }
            ("cuda", n) if n.parse::<usize>().is_ok() => {
                Device::new_cuda(n.parse().unwrap_or(0)).map_err(gone)?
            }
            ("metal", "0") => Device::new_metal(0).map_err(gone)?,
            _ => {
                return Err(Error::unsupported(
                    format!("device {name} is unknown"),
                    "use auto, cpu, cuda, cuda:N or metal",
                ))
            }
        };
        Ok(Compute { device, ..Compute::cpu() })
    }

    /// The CPU, with exact products.
    pub fn cpu() -> Compute {
        Compute {
            device: Device::Cpu,
            arithmetic: Arithmetic::Exact,
            cancel: Cancel::default(),
            work: Arc::default(),
        }
    }

    /// The same device. A GPU multiplies floats in any case.
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Compute {
        Compute { arithmetic, ..self }
    }

    /// The same device, for a run that `cancel` ends.
    pub fn with_cancel(self, cancel: Cancel) -> Compute {
        Compute { cancel, ..self }
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// `Interrupted`, where the run was cancelled.
    pub fn check(&self) -> Result<()> {
        self.cancel.check()
    }

    /// What ran here so far.
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// The device in words, for the report.
    pub fn describe(&self) -> &'static str {
        match self.device {
            Device::Cpu if self.arithmetic == Arithmetic::Exact => "cpu, exact",
            Device::Cpu => "cpu",
            Device::Cuda(_) => "cuda",
            Device::Metal(_) => "metal",
        }
    }

    /// y = x Wᵀ: `x` is `[n, w.cols]`, the result `[n, w.rows]`.
    ///
    /// # Errors
    /// What the device says; `Interrupted`.
    pub fn matmul(&self, x: &[f32], n: usize, w: &Matrix) -> Result<Vec<f32>> {
        let mut y = vec![0.0f32; n * w.rows];
        if self.device.is_cpu() {
            product(self.arithmetic, x, n, w, 0..w.rows, &mut y, &self.cancel)?;
            return Ok(y);
        }
        self.tiles(x, n, w, |rows, tile| {
            let (width, start) = (rows.len(), rows.start);
            y.par_chunks_mut(w.rows)
                .zip(tile.par_chunks(width))
                .for_each(|(to, from)| to[start..start + width].copy_from_slice(from));
            Ok(())
        })?;
        Ok(y)
    }

    /// Hands the product to `f` a tile at a time: the output features, and `[n, features]`. On the
    /// CPU tiles begin at multiples of 1024.
    ///
    /// # Errors
    /// What the device or `f` says; `Interrupted`.
    pub fn tiles(
        &self,
        x: &[f32],
        n: usize,
        w: &Matrix,
        mut f: impl FnMut(Range<usize>, &[f32]) -> Result<()>,
    ) -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        if self.device.is_cpu() {
            let step = (TILE / n / ROWS).max(1) * ROWS;
            let mut tile = vec![0.0f32; n * step.min(w.rows)];
            for start in (0..w.rows).step_by(step) {
                let rows = start..(start + step).min(w.rows);
                let tile = &mut tile[..n * rows.len()];
                product(self.arithmetic, x, n, w, rows.clone(), tile, &self.cancel)?;
                f(rows, tile)?;
            }
            return Ok(());
        }
        let input = Tensor::from_slice(x, (n, w.cols), &self.device).map_err(device_error)?;
        // The product's tile stays small too when the rows of x are many (logits of a large
        // vocabulary).
        let step = (TILE / w.cols.max(n)).clamp(16, w.rows.max(16));
        let mut start = 0;
        while start < w.rows {
            self.cancel.check()?;
            let rows = start..(start + step).min(w.rows);
            let mut weights = vec![0.0f32; rows.len() * w.cols];
            weights
                .par_chunks_mut(w.cols)
                .enumerate()
                .with_min_len(16)
                .for_each(|(i, out)| w.decode_row(rows.start + i, out));
            let product = Tensor::from_vec(weights, (rows.len(), w.cols), &self.device)
                .and_then(|t| input.matmul(&t.t()?))
                .and_then(|t| t.flatten_all()?.to_vec1::<f32>())
                .map_err(device_error)?;
            start = rows.end;
            f(rows, &product)?;
        }
        Ok(())
    }
}

fn device_error(e: candle_core::Error) -> Error {
    Error::Limit(format!("the compute device failed: {e}; try `device` cpu or a smaller `memory`"))
}
