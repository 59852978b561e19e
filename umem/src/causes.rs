//! Errors as people read them: one chain of causes.

use std::error::Error;

/// What an error and its causes say, outermost first, none twice.
pub fn causes(error: &dyn Error) -> Vec<String> {
    let mut said = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        // An error that only passes on another has that one's message.
        if !said.last().is_some_and(|last| last.ends_with(&message)) {
            said.push(message);
        }
        cause = error.source();
    }
    said
}

/// The same in one line.
pub fn chain(error: &dyn Error) -> String {
    causes(error).join(": ")
}
