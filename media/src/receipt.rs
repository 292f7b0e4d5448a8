//! The receipt that the echo engine speaks before the caller's words: who answers, and what it remembers.
//!
//! Eighteen hexadecimal digits, most significant first, each one DTMF tone ([`crate::dtmf`]) of 60 ms, back to back:
//!
//! | digits | field | |
//! |---|---|---|
//! | 0..2 | turn | the caller's turn that is answered, modulo 256 |
//! | 2..10 | chain | `H_k`, see below |
//! | 10..14 | nonce | random per worker process |
//! | 14..16 | epoch | of the session's owner, modulo 256 |
//! | 16..18 | check | CRC-8 (polynomial 0x07, initial value 0) of the eight bytes before |
//!
//! `H_0` is 0; `H_k` is the first 32 bits of SHA-256(`H_(k-1)` ‖ `code_k`), both big endian, 4 and 2 bytes.
//! `code_k` is four hexadecimal digits spoken as DTMF at the beginning of the caller's turn k, or 0 without them.
//! So the chain of a receipt is right only if all codes so far were heard, in order, and once each.
//!
//! Digits 0 to 9 and A to D are the keys of those names, E is `*` and F is `#`.

use std::time::Duration;

use sha2::{Digest, Sha256};

/// Digits of a receipt.
pub const DIGITS: usize = 18;

/// Length of each digit's tone.
pub const DIGIT: Duration = Duration::from_millis(60);

/// Length of a whole receipt.
pub const DURATION: Duration = Duration::from_millis(60 * DIGITS as u64);

/// What a receipt says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Receipt {
    /// The caller's turn that is answered, modulo 256.
    pub turn: u8,
    /// Of all codes up to this turn.
    pub chain: u32,
    /// Of the process that answers.
    pub nonce: u16,
    /// Of the session's owner, modulo 256.
    pub epoch: u8,
}

/// Why digits are not a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    /// Wrong number of digits.
    #[error("{0} digits, a receipt has 18")]
    Length(usize),
    /// A digit above 15.
    #[error("digit {digit} at place {place} is not hexadecimal")]
    Digit {
        /// Its value.
        digit: u8,
        /// 0..18.
        place: usize,
    },
    /// The check digits belong to something else.
    #[error("check digits are {found:02x}, the rest makes {expected:02x}")]
    Check {
        /// As heard.
        found: u8,
        /// Of the other digits.
        expected: u8,
    },
}

impl Receipt {
    /// The digits, 0..=15 each, in the order they are spoken.
    pub fn digits(&self) -> [u8; DIGITS] {
        let bytes = self.bytes();
        let mut digits = [0; DIGITS];
        for (place, digit) in digits.iter_mut().enumerate() {
            let byte = bytes.get(place / 2).copied().unwrap_or_else(|| crc8(&bytes));
            *digit = if place % 2 == 0 { byte >> 4 } else { byte & 0x0f };
        }
        digits
    }

    /// Reads digits back and checks them.
    pub fn parse(digits: &[u8]) -> Result<Self, ReceiptError> {
        if digits.len() != DIGITS {
            return Err(ReceiptError::Length(digits.len()));
        }
        if let Some((place, &digit)) = digits.iter().enumerate().find(|&(_, &digit)| digit > 15) {
            return Err(ReceiptError::Digit { digit, place });
        }
        let mut bytes = [0; DIGITS / 2];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
            *byte = pair[0] << 4 | pair[1];
        }
        let [turn, c0, c1, c2, c3, n0, n1, epoch, found] = bytes;
        let expected = crc8(&bytes[..DIGITS / 2 - 1]);
        if found != expected {
            return Err(ReceiptError::Check { found, expected });
        }
        let chain = u32::from_be_bytes([c0, c1, c2, c3]);
        Ok(Self { turn, chain, nonce: u16::from_be_bytes([n0, n1]), epoch })
    }

    fn bytes(&self) -> [u8; 8] {
        let [c0, c1, c2, c3] = self.chain.to_be_bytes();
        let [n0, n1] = self.nonce.to_be_bytes();
        [self.turn, c0, c1, c2, c3, n0, n1, self.epoch]
    }
}

/// `H_k` of `H_(k-1)` and `code_k`.
pub fn chain(previous: u32, code: u16) -> u32 {
    let hash = Sha256::new().chain_update(previous.to_be_bytes()).chain_update(code.to_be_bytes()).finalize();
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])
}

/// The four digits of a code, in the order they are spoken.
pub fn code_digits(code: u16) -> [u8; 4] {
    [12, 8, 4, 0].map(|shift| (code >> shift) as u8 & 0x0f)
}

/// The code of four digits, 0..=15 each.
pub fn code_from_digits(digits: [u8; 4]) -> u16 {
    digits.iter().fold(0, |code, &digit| code << 4 | u16::from(digit & 0x0f))
}

/// CRC-8/SMBUS.
fn crc8(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0, |crc, byte| (0..8).fold(crc ^ byte, |crc, _| if crc & 0x80 == 0 { crc << 1 } else { crc << 1 ^ 0x07 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_frozen() {
        let receipt = Receipt { turn: 0x02, chain: 0x1234_abcd, nonce: 0xbeef, epoch: 0x01 };
        let text: String = receipt.digits().iter().map(|&digit| char::from_digit(digit.into(), 16).unwrap()).collect();
        assert_eq!(&text[..16], "021234abcdbeef01");
        assert_eq!(&text[16..], format!("{:02x}", crc8(b"\x02\x12\x34\xab\xcd\xbe\xef\x01")));
        assert_eq!(crc8(b"123456789"), 0xf4, "check value of CRC-8/SMBUS");
    }

    #[test]
    fn the_chain_is_frozen() {
        // printf '\0\0\0\0\x12\x34' | sha256sum
        assert_eq!(chain(0, 0x1234), CHAIN_OF_1234);
        assert_ne!(chain(CHAIN_OF_1234, 1), chain(0, 1));
    }
    const CHAIN_OF_1234: u32 = 0x65d1_e960;

    #[test]
    fn wrong_digits_say_why() {
        let mut digits = Receipt { turn: 1, chain: 2, nonce: 3, epoch: 4 }.digits();
        assert_eq!(Receipt::parse(&digits[1..]), Err(ReceiptError::Length(17)));
        digits[9] ^= 1;
        assert!(matches!(Receipt::parse(&digits), Err(ReceiptError::Check { .. })));
        digits[9] = 16;
        assert_eq!(Receipt::parse(&digits), Err(ReceiptError::Digit { digit: 16, place: 9 }));
    }

    proptest! {
        #[test]
        fn receipts_round_trip(turn: u8, chain: u32, nonce: u16, epoch: u8, code: u16) {
            let receipt = Receipt { turn, chain, nonce, epoch };
            prop_assert_eq!(Receipt::parse(&receipt.digits()), Ok(receipt));
            prop_assert_eq!(code_from_digits(code_digits(code)), code);
        }
    }
}
