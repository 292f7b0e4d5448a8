//! qlog as its readers expect it.

use std::io::{self, Write};

use serde_json::Value;

/// Passes records of a JSON text sequence (RFC 7464) on, with round trips in milliseconds.
///
/// quinn-proto 0.11 writes them in seconds; milliseconds is what draft-ietf-quic-qlog-quic-events says of
/// `recovery_metrics_updated`, and what readers draw.
pub(crate) struct Milliseconds<W> {
    inner: W,
    /// The record that is being written, up to its line break.
    record: Vec<u8>,
}

impl<W: Write> Milliseconds<W> {
    pub(crate) const fn new(inner: W) -> Self {
        Self { inner, record: Vec::new() }
    }
}

impl<W: Write> Write for Milliseconds<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.record.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let record = std::mem::take(&mut self.record);
                self.inner.write_all(&in_milliseconds(&record).unwrap_or(record))?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The record anew if it has round trips.
fn in_milliseconds(record: &[u8]) -> Option<Vec<u8>> {
    let json = record.strip_prefix(&[SEPARATOR])?;
    // Most records are packets: they are not read.
    json.windows(NAME.len()).any(|window| window == NAME).then_some(())?;
    let mut event: Value = serde_json::from_slice(json).ok()?;
    let data = event.get_mut("data")?.as_object_mut()?;
    for (_, value) in data.iter_mut().filter(|(name, _)| TIMES.contains(&name.as_str())) {
        let seconds = value.as_f64()?;
        // Microseconds are as fine as they are measured.
        *value = ((seconds * 1e6).round() / 1e3).into();
    }
    let mut record = vec![SEPARATOR];
    serde_json::to_writer(&mut record, &event).ok()?;
    record.push(b'\n');
    Some(record)
}

const SEPARATOR: u8 = 0x1e;
const NAME: &[u8] = b"metrics_updated";
const TIMES: [&str; 4] = ["min_rtt", "smoothed_rtt", "latest_rtt", "rtt_variance"];

#[cfg(test)]
mod tests {
    use super::*;

    fn written(parts: &[&str]) -> String {
        let mut writer = Milliseconds::new(Vec::new());
        for part in parts {
            writer.write_all(part.as_bytes()).unwrap();
        }
        String::from_utf8(writer.inner).unwrap()
    }

    #[test]
    fn round_trips_are_milliseconds_however_they_are_written() {
        let metrics = "\u{1e}{\"time\":1.5,\"name\":\"recovery:metrics_updated\",\
                       \"data\":{\"min_rtt\":0.0012345,\"smoothed_rtt\":0.25,\"bytes_in_flight\":7}}\n";
        let (begin, end) = metrics.split_at(40);
        for parts in [&[metrics][..], &[begin, end]] {
            let text = written(parts);
            let event: Value = serde_json::from_str(text.trim_start_matches('\u{1e}')).unwrap();
            assert!(text.starts_with('\u{1e}') && text.ends_with("}\n"), "{text}");
            assert_eq!(
                event["data"],
                serde_json::json!({"min_rtt": 1.235, "smoothed_rtt": 250.0, "bytes_in_flight": 7})
            );
            assert_eq!((&event["time"], &event["name"]), (&1.5.into(), &"recovery:metrics_updated".into()));
        }
    }

    #[test]
    fn everything_else_passes_as_it_is() {
        let sent = "\u{1e}{\"name\":\"transport:packet_sent\",\"data\":{\"min_rtt\":0.5}}\n";
        let broken = "\u{1e}{\"name\":\"recovery:metrics_updated\",\"data\":\n";
        assert_eq!(written(&[sent, broken, "rest"]), format!("{sent}{broken}"));
    }
}
