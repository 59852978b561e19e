//! Whether compressing is worth the time.

use crate::wire::lz4::{Compressor, bound};

/// The most answers that are not tried after one that did not become shorter.
const MAX_PAUSE: u32 = 64;

/// A channel's compressor, which stops trying for a while on data that does not become shorter.
#[derive(Debug)]
pub(super) struct Adaptive {
    compressor: Compressor,
    buffer: Vec<u8>,
    pause: Pause,
}

#[derive(Debug, Default)]
struct Pause {
    /// Answers still to be left alone.
    left: u32,
    /// How many it is the next time.
    length: u32,
}

impl Adaptive {
    /// For data of at most `longest` bytes.
    pub(super) fn new(longest: usize) -> Self {
        Self {
            compressor: Compressor::default(),
            buffer: vec![0; bound(longest)],
            pause: Pause::default(),
        }
    }

    /// `data` made shorter. `None`: it is not, or was not tried.
    pub(super) fn compress(&mut self, data: &[u8]) -> Option<&[u8]> {
        if !self.pause.is_over() {
            return None;
        }
        let compressed = self.compressor.compress(data, &mut self.buffer);
        let length = compressed.map_or(data.len(), <[u8]>::len);
        // What saves less than an eighth is sent, but does not pay for itself.
        self.pause.tried(length + data.len() / 8 <= data.len());
        compressed
    }
}

impl Pause {
    /// Whether the next answer is to be tried.
    fn is_over(&mut self) -> bool {
        let over = self.left == 0;
        self.left = self.left.saturating_sub(1);
        over
    }

    fn tried(&mut self, worthwhile: bool) {
        self.length = if worthwhile {
            0
        } else {
            (2 * self.length).clamp(1, MAX_PAUSE)
        };
        self.left = self.length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `answers` are tried.
    fn tries(pause: &mut Pause, answers: u32, worthwhile: bool) -> u32 {
        (0..answers)
            .map(|_| {
                let tried = pause.is_over();
                if tried {
                    pause.tried(worthwhile);
                }
                u32::from(tried)
            })
            .sum()
    }

    #[test]
    fn what_does_not_compress_is_tried_less_and_less_but_never_given_up() {
        let mut pause = Pause::default();
        assert_eq!(tries(&mut pause, 100, true), 100);
        // At first after 1, 2, 4, 8, 16 and 32 others, then after 64 each time.
        assert_eq!(tries(&mut pause, 1 + 2 + 3 + 5 + 9 + 17 + 33, false), 7);
        assert_eq!(tries(&mut pause, 65 * 10, false), 10);
        assert!(pause.left <= MAX_PAUSE);
        assert_eq!(tries(&mut pause, MAX_PAUSE + 1, true), 1);
        assert_eq!(tries(&mut pause, 10, true), 10);
    }

    #[test]
    fn only_what_becomes_shorter_is_answered() {
        let mut adaptive = Adaptive::new(4096);
        assert!(
            adaptive
                .compress(&[7; 4096])
                .is_some_and(|short| short.len() < 100)
        );
        let mut noise = [0; 4096];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        assert!(adaptive.compress(&noise).is_none());
    }
}
