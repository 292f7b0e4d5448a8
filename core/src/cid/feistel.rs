//! The four-pass cipher for lengths other than one AES block (draft, section 5.4.2).
//!
//! A Feistel network of four rounds over the two halves of `server ID || nonce`. With an odd length the middle octet
//! belongs to both: its high nibble to the left half, its low nibble to the right one.

use aes::{
    Aes128,
    cipher::{Block, BlockCipherEncrypt as _},
};

use super::MAX_BODY_LEN;

const MAX_HALF_LEN: usize = MAX_BODY_LEN.div_ceil(2);

struct Halves {
    left: [u8; MAX_HALF_LEN],
    right: [u8; MAX_HALF_LEN],
    /// Octets in either half.
    half: usize,
    /// Octets in both together, 5..=19.
    len: usize,
}

impl Halves {
    fn split(text: &[u8]) -> Self {
        let (len, half) = (text.len(), text.len().div_ceil(2));
        let (mut left, mut right) = ([0; MAX_HALF_LEN], [0; MAX_HALF_LEN]);
        left[..half].copy_from_slice(&text[..half]);
        right[..half].copy_from_slice(&text[len - half..]);
        let mut halves = Self { left, right, half, len };
        halves.clear_foreign_nibbles();
        halves
    }

    fn clear_foreign_nibbles(&mut self) {
        if self.len % 2 == 1 {
            self.left[self.half - 1] &= 0xf0;
            self.right[0] &= 0x0f;
        }
    }

    /// One round: odd passes change the right half, even ones the left.
    fn pass(&mut self, cipher: &Aes128, pass: u8) {
        let (source, target) =
            if pass % 2 == 1 { (&self.left, &mut self.right) } else { (&self.right, &mut self.left) };
        let mut block = Block::<Aes128>::default();
        block[..self.half].copy_from_slice(&source[..self.half]);
        block[14] = self.len as u8;
        block[15] = pass;
        cipher.encrypt_block(&mut block);
        for (t, mask) in target[..self.half].iter_mut().zip(block.iter()) {
            *t ^= mask;
        }
        self.clear_foreign_nibbles();
    }

    fn join(&self, text: &mut [u8]) {
        text[..self.half].copy_from_slice(&self.left[..self.half]);
        let right_at = self.len - self.half;
        if self.len % 2 == 1 {
            text[right_at] |= self.right[0];
            text[right_at + 1..].copy_from_slice(&self.right[1..self.half]);
        } else {
            text[right_at..].copy_from_slice(&self.right[..self.half]);
        }
    }
}

/// Encrypts in place; `text` has 5..=19 octets.
pub(super) fn encrypt(cipher: &Aes128, text: &mut [u8]) {
    let mut halves = Halves::split(text);
    (1..=4).for_each(|pass| halves.pass(cipher, pass));
    halves.join(text);
}

/// Reverses [`encrypt`].
pub(super) fn decrypt(cipher: &Aes128, text: &mut [u8]) {
    let mut halves = Halves::split(text);
    (1..=4).rev().for_each(|pass| halves.pass(cipher, pass));
    halves.join(text);
}

/// Three passes of [`decrypt`]: only the first `len / 2` octets of `text` are plain afterwards.
pub(super) fn decrypt_left(cipher: &Aes128, text: &mut [u8]) {
    let mut halves = Halves::split(text);
    (2..=4).rev().for_each(|pass| halves.pass(cipher, pass));
    halves.join(text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use aes::cipher::KeyInit as _;

    /// Draft, section 5.4.2.4, pass by pass.
    #[test]
    fn every_pass_of_the_published_example_is_reproduced() {
        let key: [u8; 16] = hex::decode("fdf726a9893ec05c0632d3956680baf0").unwrap().try_into().unwrap();
        let cipher = Aes128::new(&key.into());
        let mut halves = Halves::split(&hex::decode("31441a9c69c275").unwrap());
        let shown = |h: &Halves| (hex::encode(&h.left[..4]), hex::encode(&h.right[..4]));
        let expected =
            [("31441a90", "0e3c1ff9"), ("d4a04850", "0e3c1ff9"), ("d4a04850", "09be054a"), ("67947d20", "09be054a")];
        assert_eq!(shown(&halves), ("31441a90".into(), "0c69c275".into()));
        for (pass, (left, right)) in (1..).zip(expected) {
            halves.pass(&cipher, pass);
            assert_eq!(shown(&halves), (left.into(), right.into()), "after pass {pass}");
        }
    }
}
