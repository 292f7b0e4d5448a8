//! Key generations.

/// Why a region cannot be told to move to a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WantedError {
    /// Backwards: what is minted with the present one would be lost.
    #[error("{asked} is below the present generation, {present}: generations only go up")]
    Backwards {
        /// The one that is wanted now.
        present: u32,
        /// The one asked for.
        asked: u32,
    },
    /// More than one step: nobody would have loaded the one in between.
    #[error("{asked} is more than one above the present generation, {present}")]
    Jump {
        /// The one that is wanted now.
        present: u32,
        /// The one asked for.
        asked: u32,
    },
}

/// The wanted generation after somebody asked for one; 0 asks for nothing.
///
/// # Errors
/// [`WantedError`]: it can stay or go up by one.
pub const fn wanted(present: u32, asked: u32) -> Result<u32, WantedError> {
    let first = if present == 0 { 1 } else { present };
    if asked == 0 {
        Ok(present)
    } else if asked < first {
        Err(WantedError::Backwards { present: first, asked })
    } else if asked > first.saturating_add(1) {
        Err(WantedError::Jump { present: first, asked })
    } else {
        Ok(asked)
    }
}
