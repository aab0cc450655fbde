//! Metadata values. gguf-rs-lib reads and writes the numbers. Strings stay bytes, because the text
//! of a token needn't be UTF-8.

use gguf_rs_lib::format::{GGUFValueType, MetadataValue};

/// A metadata value.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// A number or a boolean.
    Scalar(MetadataValue),
    /// A string, which needn't be UTF-8.
    String(Vec<u8>),
    /// An array of numbers or booleans.
    Numbers(Numbers),
    /// An array of strings.
    Strings(Vec<Vec<u8>>),
}

/// An array of numbers of one type. It keeps the file's bytes, because a vocabulary has hundreds of
/// thousands of numbers.
#[derive(Clone, PartialEq, Debug)]
pub struct Numbers {
    kind: GGUFValueType,
    bytes: Vec<u8>,
}

impl Numbers {
    /// An array from its bytes, which must hold whole little-endian elements of the fixed-size type
    /// `kind`.
    pub(super) fn new(kind: GGUFValueType, bytes: Vec<u8>) -> Numbers {
        debug_assert!(kind.size_in_bytes().is_some_and(|size| bytes.len().is_multiple_of(size)));
        Numbers { kind, bytes }
    }

    /// The type of the elements.
    pub fn kind(&self) -> GGUFValueType {
        self.kind
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.kind.size_in_bytes().unwrap_or(1)
    }

    /// True for an array without elements.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements. `None` stands for an element that the type doesn't allow, such as a boolean of
    /// 7.
    pub fn iter(&self) -> impl Iterator<Item = Option<MetadataValue>> + '_ {
        let size = self.kind.size_in_bytes().unwrap_or(1);
        self.bytes.chunks_exact(size).map(|mut b| MetadataValue::read_from(&mut b, self.kind).ok())
    }

    fn collect<T>(&self, convert: impl Fn(&MetadataValue) -> Option<T>) -> Option<Vec<T>> {
        self.iter().map(|v| convert(&v?)).collect()
    }
}

fn integer(v: &MetadataValue) -> Option<i128> {
    v.as_u64().map(i128::from).or_else(|| v.as_i64().map(i128::from))
}

impl Value {
    /// An array of 32-bit floats.
    pub fn f32s(values: &[f32]) -> Value {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Value::Numbers(Numbers::new(GGUFValueType::F32, bytes))
    }

    /// An array of 32-bit unsigned integers.
    pub fn u32s(values: &[u32]) -> Value {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Value::Numbers(Numbers::new(GGUFValueType::U32, bytes))
    }

    /// The type of the value, for messages: `u32`, `string`, `array of f32`.
    pub fn type_name(&self) -> String {
        match self {
            Value::Scalar(v) => v.value_type().name().to_string(),
            Value::String(_) => "string".to_string(),
            Value::Numbers(n) => format!("array of {}", n.kind.name()),
            Value::Strings(_) => "array of string".to_string(),
        }
    }

    /// The string, if the value is one and is UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        self.as_bytes().and_then(|b| std::str::from_utf8(b).ok())
    }

    /// The string's bytes, if the value is a string.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        match self {
            Value::String(b) => Some(b),
            _ => None,
        }
    }

    /// The integer, if the value is one (of any width and sign) that fits into a `u64`.
    pub fn as_u64(&self) -> Option<u64> {
        self.as_integer().and_then(|i| i.try_into().ok())
    }

    /// The integer, if the value is one (of any width and sign) that fits into an `i64`.
    pub fn as_i64(&self) -> Option<i64> {
        self.as_integer().and_then(|i| i.try_into().ok())
    }

    fn as_integer(&self) -> Option<i128> {
        match self {
            Value::Scalar(v) => integer(v),
            _ => None,
        }
    }

    /// The float, if the value is one (of either width).
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Scalar(v) => v.as_f64(),
            _ => None,
        }
    }

    /// The boolean, if the value is one.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Scalar(v) => v.as_bool(),
            _ => None,
        }
    }

    /// The array of strings, as bytes. An empty array of another type counts as one.
    pub fn as_strings(&self) -> Option<&[Vec<u8>]> {
        match self {
            Value::Strings(s) => Some(s),
            Value::Numbers(n) if n.is_empty() => Some(&[]),
            _ => None,
        }
    }

    /// The array of integers, if every element fits into a `u32`.
    pub fn to_u32s(&self) -> Option<Vec<u32>> {
        self.numbers()?.collect(|v| integer(v)?.try_into().ok())
    }

    /// The array of integers, if every element fits into an `i64`.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        self.numbers()?.collect(|v| integer(v)?.try_into().ok())
    }

    /// The array of floats. 64-bit floats are rounded.
    pub fn to_f32s(&self) -> Option<Vec<f32>> {
        self.numbers()?.collect(|v| match v {
            MetadataValue::F32(x) => Some(*x),
            _ => v.as_f64().map(|x| x as f32),
        })
    }

    /// The array of booleans.
    pub fn to_bools(&self) -> Option<Vec<bool>> {
        self.numbers()?.collect(MetadataValue::as_bool)
    }

    /// The array of numbers or booleans, if the value is one.
    pub fn numbers(&self) -> Option<&Numbers> {
        match self {
            Value::Numbers(n) => Some(n),
            _ => None,
        }
    }

    /// Appends the value in the file's format: type, then content.
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            Value::Scalar(v) => {
                out.extend((v.value_type() as u32).to_le_bytes());
                v.write_to(out).expect("a number always fits in memory");
            }
            Value::String(s) => {
                out.extend((GGUFValueType::String as u32).to_le_bytes());
                write_string(s, out);
            }
            Value::Numbers(n) => {
                write_array_head(n.kind, n.len(), out);
                out.extend(&n.bytes);
            }
            Value::Strings(strings) => {
                write_array_head(GGUFValueType::String, strings.len(), out);
                strings.iter().for_each(|s| write_string(s, out));
            }
        }
    }
}

fn write_array_head(kind: GGUFValueType, len: usize, out: &mut Vec<u8>) {
    out.extend((GGUFValueType::Array as u32).to_le_bytes());
    out.extend((kind as u32).to_le_bytes());
    out.extend((len as u64).to_le_bytes());
}

/// Appends a string in the file's format: length, then bytes.
pub(crate) fn write_string(s: &[u8], out: &mut Vec<u8>) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s);
}

impl From<&str> for Value {
    fn from(s: &str) -> Value {
        Value::String(s.as_bytes().to_vec())
    }
}

impl From<String> for Value {
    fn from(s: String) -> Value {
        Value::String(s.into_bytes())
    }
}

impl From<f32> for Value {
    fn from(x: f32) -> Value {
        Value::Scalar(MetadataValue::F32(x))
    }
}

impl From<u32> for Value {
    fn from(x: u32) -> Value {
        Value::Scalar(MetadataValue::U32(x))
    }
}

impl From<bool> for Value {
    fn from(x: bool) -> Value {
        Value::Scalar(MetadataValue::Bool(x))
    }
}
