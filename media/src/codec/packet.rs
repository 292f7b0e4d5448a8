//! The structure of Opus packets (RFC 6716, section 3), checked before the decoder sees them.

/// A well-formed packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpusPacket {
    /// Number of frames, 1..=48.
    pub frames: u8,
    /// Duration of one frame in microseconds, 2,500..=60,000.
    pub frame_us: u32,
    /// Two channels.
    pub stereo: bool,
}

/// Which of the requirements of RFC 6716, section 3.4 a packet breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed Opus packet: rule R{rule} of RFC 6716, {what}")]
pub struct OpusPacketError {
    /// 1..=7.
    pub rule: u8,
    /// The rule in words.
    pub what: &'static str,
}

impl OpusPacket {
    /// Checks a whole packet, without self-delimiting framing.
    pub fn parse(packet: &[u8]) -> Result<Self, OpusPacketError> {
        let (&toc, rest) = packet.split_first().ok_or(broken(1, "at least one byte"))?;
        let frame_us = frame_us(toc >> 3);
        let stereo = toc & 0x04 != 0;
        let frames = match toc & 0x03 {
            0 => one_frame(rest)?,
            1 => equal_frames(rest)?,
            2 => two_frames(rest)?,
            _ => many_frames(rest, frame_us)?,
        };
        Ok(Self { frames, frame_us, stereo })
    }

    /// Of the whole packet, 2,500..=120,000 microseconds.
    pub fn duration_us(&self) -> u32 {
        u32::from(self.frames) * self.frame_us
    }
}

fn one_frame(frame: &[u8]) -> Result<u8, OpusPacketError> {
    bounded(frame.len()).map(|()| 1)
}

fn equal_frames(frames: &[u8]) -> Result<u8, OpusPacketError> {
    if !frames.len().is_multiple_of(2) {
        return Err(broken(3, "two equal frames have an even number of bytes"));
    }
    bounded(frames.len() / 2).map(|()| 2)
}

fn two_frames(rest: &[u8]) -> Result<u8, OpusPacketError> {
    let wrong = broken(4, "the first of two frames fits the packet");
    let (length, rest) = frame_length(rest).ok_or(wrong)?;
    let second = rest.len().checked_sub(length).ok_or(wrong)?;
    bounded(second).map(|()| 2)
}

fn many_frames(rest: &[u8], frame_us: u32) -> Result<u8, OpusPacketError> {
    let (&head, mut rest) = rest.split_first().ok_or(broken(6, "a frame count byte"))?;
    let frames = head & 0x3f;
    if frames == 0 || u32::from(frames) * frame_us > 120_000 {
        return Err(broken(5, "1 to 48 frames and at most 120 ms"));
    }
    let padding = if head & 0x40 == 0 { 0 } else { padding(&mut rest).ok_or(broken(6, "padding fits the packet"))? };
    let mut left = rest.len().checked_sub(padding).ok_or(broken(6, "padding fits the packet"))?;
    if head & 0x80 == 0 {
        if !left.is_multiple_of(usize::from(frames)) {
            return Err(broken(6, "equal frames divide the packet"));
        }
        return bounded(left / usize::from(frames)).map(|()| frames);
    }
    let wrong = broken(7, "frames of variable length fit the packet");
    for _ in 1..frames {
        let (length, after) = frame_length(rest).ok_or(wrong)?;
        left = left.checked_sub(rest.len() - after.len() + length).ok_or(wrong)?;
        rest = after;
    }
    bounded(left).map(|()| frames)
}

/// Section 3.2.1; the rest begins after the length.
fn frame_length(bytes: &[u8]) -> Option<(usize, &[u8])> {
    match *bytes {
        [first @ 0..=251, ref rest @ ..] => Some((first.into(), rest)),
        [first, second, ref rest @ ..] => Some((usize::from(second) * 4 + usize::from(first), rest)),
        _ => None,
    }
}

/// Section 3.2.5: bytes of padding at the end of the packet; their count is taken off the front.
fn padding(rest: &mut &[u8]) -> Option<usize> {
    let mut total = 0;
    loop {
        let (&count, after) = rest.split_first()?;
        *rest = after;
        if count < 255 {
            return Some(total + usize::from(count));
        }
        total += 254;
    }
}

fn bounded(length: usize) -> Result<(), OpusPacketError> {
    if length > 1275 { Err(broken(2, "a frame has at most 1275 bytes")) } else { Ok(()) }
}

/// Table 2.
fn frame_us(config: u8) -> u32 {
    match config {
        0..=11 => [10_000, 20_000, 40_000, 60_000][usize::from(config % 4)],
        12..=15 => [10_000, 20_000][usize::from(config % 2)],
        _ => [2_500, 5_000, 10_000, 20_000][usize::from(config % 4)],
    }
}

const fn broken(rule: u8, what: &'static str) -> OpusPacketError {
    OpusPacketError { rule, what }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(packet: &[u8]) -> u8 {
        OpusPacket::parse(packet).unwrap_err().rule
    }

    #[test]
    fn each_rule_of_the_rfc_is_enforced() {
        assert_eq!(rule(&[]), 1);
        assert_eq!(rule(&[0; 1277]), 2);
        assert_eq!(rule(&[1, 0]), 3);
        assert_eq!(rule(&[2]), 4);
        assert_eq!(rule(&[2, 5, 0]), 4);
        assert_eq!(rule(&[2, 252]), 4);
        assert_eq!(rule(&[3, 0]), 5);
        assert_eq!(rule(&[3 << 3 | 3, 3, 0, 0, 0]), 5, "three frames of 60 ms");
        assert_eq!(rule(&[3]), 6);
        assert_eq!(rule(&[3, 0x41, 200]), 6);
        assert_eq!(rule(&[3, 2, 0]), 6);
        assert_eq!(rule(&[3, 0x82, 9, 0]), 7);
    }

    #[test]
    fn durations_follow_the_table() {
        let duration = |packet: &[u8]| OpusPacket::parse(packet).unwrap().duration_us();
        assert_eq!(duration(&[9 << 3]), 20_000);
        assert_eq!(duration(&[13 << 3]), 20_000);
        assert_eq!(duration(&[31 << 3]), 20_000);
        assert_eq!(duration(&[16 << 3 | 3, 48]), 120_000);
        assert_eq!(duration(&[8 << 3 | 1, 1, 1]), 20_000);
    }
}
