//! Recorded speech that comes with the project: six utterances by six synthetic voices (`assets/speech`).

use crate::wav;

macro_rules! utterance {
    ($name:literal, $text:literal) => {
        Utterance { name: $name, text: $text, bytes: include_bytes!(concat!("../../assets/speech/", $name, ".wav")) }
    };
}

/// One recorded utterance.
#[derive(Debug, Clone, Copy)]
pub struct Utterance {
    /// File name without its ending.
    pub name: &'static str,
    /// What is said.
    pub text: &'static str,
    bytes: &'static [u8],
}

impl Utterance {
    /// All of them.
    pub const ALL: [Self; 6] = [
        utterance!("1-booking", "I would like to move my booking to the third of May."),
        utterance!("2-parcel", "Where is the parcel you were going to send me?"),
        utterance!("3-balance", "Please tell me how much money is left in my account."),
        utterance!("4-weather", "Will it rain in the mountains tomorrow afternoon?"),
        utterance!("5-doctor", "Could a doctor call me back before four o'clock?"),
        utterance!("6-train", "Which platform does the night train to Vienna leave from?"),
    ];

    /// Samples, 16 kHz; 2.2 to 2.6 s of them.
    pub fn pcm(&self) -> Vec<i16> {
        let wav = wav::read(self.bytes).expect("bundled recordings are valid, a test reads them all");
        wav.pcm
    }
}

/// Samples per second of [`Utterance::pcm`].
pub const RATE: u32 = 16_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::levels;

    #[test]
    fn all_utterances_are_short_speech_at_16_khz() {
        for utterance in Utterance::ALL {
            let wav = wav::read(utterance.bytes).unwrap();
            assert_eq!(wav.rate, RATE);
            assert!((32_000..44_800).contains(&wav.pcm.len()), "{}: {}", utterance.name, wav.pcm.len());
            assert!(levels::rms(&wav.pcm) > 1500.0, "{}", utterance.name);
            assert_eq!(utterance.pcm(), wav.pcm);
        }
    }
}
