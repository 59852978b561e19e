//! What every error message must be like.

use crate::program::Finished;

impl Finished {
    /// Checks that it failed with this exit code and one message, and that the message has all of these words.
    #[track_caller]
    pub fn assert_error(&self, code: i32, words: &[&str]) {
        self.assert_code(code);
        assert!(!self.stderr.trim().is_empty(), "there is no message\n{self}");
        for sign_of_a_bug in ["panicked", "RUST_BACKTRACE", "Os {", "Error(", "kind:"] {
            assert!(
                !self.stderr.contains(sign_of_a_bug),
                "'{sign_of_a_bug}' is not for people\n{self}"
            );
        }
        for word in words {
            assert!(
                self.stderr.to_lowercase().contains(&word.to_lowercase()),
                "the message does not have '{word}'\n{self}"
            );
        }
        let causes: Vec<_> = self.stderr.trim().split(": ").collect();
        for (index, cause) in causes.iter().enumerate() {
            assert!(
                !causes[..index].contains(cause),
                "the message says '{cause}' twice\n{self}"
            );
        }
    }
}
