//! QUIC variable-length integers (RFC 9000, section 16): 62 bits in 1, 2, 4 or 8 bytes.

/// Largest value that can be written.
pub const MAX: u64 = (1 << 62) - 1;

/// Reads one integer off the front; returns it and how many bytes it took. `None` if the bytes are cut short.
#[must_use]
pub fn read(bytes: &[u8]) -> Option<(u64, usize)> {
    let first = *bytes.first()?;
    let length = 1_usize << (first >> 6);
    let rest = bytes.get(1..length)?;
    let value = rest.iter().fold(u64::from(first & 0x3f), |value, byte| value << 8 | u64::from(*byte));
    Some((value, length))
}

/// Appends an integer in its shortest form. Values above [`MAX`] are clamped to it.
pub fn write(value: u64, out: &mut Vec<u8>) {
    let value = value.min(MAX);
    let (prefix, length) = match value {
        0..0x40 => (0_u8, 1),
        0x40..0x4000 => (0x40, 2),
        0x4000..0x4000_0000 => (0x80, 4),
        _ => (0xc0, 8),
    };
    let start = out.len();
    out.extend_from_slice(&value.to_be_bytes()[8 - length..]);
    out[start] |= prefix;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 9000, appendix A.1.
    #[test]
    fn published_examples() {
        for (wire, value) in
            [("c2197c5eff14e88c", 151_288_809_941_952_652), ("9d7f3e7d", 494_878_333), ("7bbd", 15_293), ("25", 37)]
        {
            let bytes = hex::decode(wire).unwrap();
            assert_eq!(read(&bytes), Some((value, bytes.len())));
            let mut out = Vec::new();
            write(value, &mut out);
            assert_eq!(out, bytes);
        }
        assert_eq!(read(&[0x40, 0x25]), Some((37, 2)));
        assert_eq!(read(&[0xc0, 1]), None);
        assert_eq!(read(&[]), None);
    }

    proptest! {
        #[test]
        fn round_trip(value in 0..=MAX) {
            let mut out = vec![9];
            write(value, &mut out);
            prop_assert_eq!(read(&out[1..]), Some((value, out.len() - 1)));
        }
    }
}
