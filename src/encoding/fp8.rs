//! 8-bit floats. A code is the float's rank in numerical order, as for wider floats: −0.0 has code
//! −1 and +0.0 has code 0.

use std::sync::LazyLock;

/// The two formats of 8-bit floats (OCP).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fp8 {
    /// 4 bits of exponent, 3 of mantissa, no infinities.
    E4M3,
    /// 5 bits of exponent, 2 of mantissa.
    E5M2,
}

/// The code of a float's bits.
pub(super) fn code(bits: u8) -> i32 {
    let b = bits as i8;
    (b ^ ((b >> 7) & 0x7f)).into()
}

/// The float's bits of a code. The map between bits and codes is its own inverse.
pub(super) fn bits(c: i32) -> u8 {
    code(c as u8) as u8
}

impl Fp8 {
    /// The value of a code.
    pub(super) fn value(self, code: i32) -> f32 {
        static TABLES: [LazyLock<[f32; 256]>; 2] = [
            LazyLock::new(|| std::array::from_fn(|b| Fp8::E4M3.decode(b as u8))),
            LazyLock::new(|| std::array::from_fn(|b| Fp8::E5M2.decode(b as u8))),
        ];
        TABLES[self as usize][usize::from(bits(code))]
    }

    /// The value of a float's bits.
    fn decode(self, b: u8) -> f32 {
        let (exponent, mantissa) = match self {
            Fp8::E4M3 => ((b >> 3) & 15, b & 7),
            Fp8::E5M2 => ((b >> 2) & 31, b & 3),
        };
        let (steps, bias, special) = match self {
            Fp8::E4M3 => (8.0, 7, b & 0x7f == 0x7f),
            Fp8::E5M2 => (4.0, 15, exponent == 31),
        };
        let sign = if b > 127 { -1.0 } else { 1.0 };
        if special {
            return if self == Fp8::E5M2 && mantissa == 0 {
                sign * f32::INFINITY
            } else {
                f32::NAN
            };
        }
        let fraction = f32::from(mantissa) / steps;
        let size = match exponent {
            0 => fraction * 2f32.powi(1 - bias),
            e => (1.0 + fraction) * 2f32.powi(i32::from(e) - bias),
        };
        sign * size
    }

    /// The codes of the lowest and the highest finite value.
    pub(super) fn code_range(self) -> (i32, i32) {
        let high = match self {
            Fp8::E4M3 => 0x7e,
            Fp8::E5M2 => 0x7b,
        };
        (!high, high)
    }

    /// The lowest code whose value is at least `x`, or the highest code if there is none. The
    /// caller compares the neighbouring codes too.
    pub(super) fn nearest(self, x: f32) -> i32 {
        let (mut low, mut high) = self.code_range();
        while low < high {
            let middle = (low + high).div_euclid(2);
            if self.value(middle) < x {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_ascend_with_codes_and_bits_round_trip() {
        for kind in [Fp8::E4M3, Fp8::E5M2] {
            let (low, high) = kind.code_range();
            for code in low..high {
                assert!(kind.value(code) <= kind.value(code + 1), "{kind:?} {code}");
                assert_eq!(super::code(bits(code)), code);
            }
        }
        // The largest and the smallest positive numbers of OCP's specification.
        assert_eq!((Fp8::E4M3.value(0x7e), Fp8::E4M3.value(1)), (448.0, 2f32.powi(-9)));
        assert_eq!((Fp8::E5M2.value(0x7b), Fp8::E5M2.value(1)), (57344.0, 2f32.powi(-16)));
        assert!(Fp8::E4M3.value(0x7f).is_nan() && Fp8::E5M2.value(0x7c).is_infinite());
    }
}
