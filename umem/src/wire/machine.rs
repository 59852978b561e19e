//! A machine that moves, and to whom it belongs.

use super::codes::codes;
use super::fields::{Fields, put_text};
use super::{MAX_TEXT, WireError};

codes! {
    /// A step of a handover. Each side says the step that it has reached, also when asked again on a new channel: hearing one twice is
    /// hearing it once.
    pub enum Step {
        /// From the fetcher: it can take the machine, and installs RAM in units of so many pages.
        Prepared = 1 => "prepared",
        /// From the fetcher: the machine's state is loaded, and it is about to run.
        Loaded = 2 => "loaded",
        /// From the provider: the machine is the fetcher's. It has not run here since its state was sent, and never will.
        Commit = 3 => "commit",
        /// From the fetcher: it runs.
        Running = 4 => "running",
        /// From the fetcher: it has every page.
        Complete = 5 => "complete",
        /// From either, before the commit: the machine stays where it is.
        Abort = 6 => "abort",
    }
}

/// What a side says of a handover.
///
/// ```text
/// offset  size  field
///      0     4  a number that belongs to the step; else 0
///      4     2  step
///      6     2  length of the text, at most 512
///      8     n  text for people, UTF-8
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handover<'a> {
    /// Which step.
    pub step: Step,
    /// Of `Prepared`: pages in a unit.
    pub value: u32,
    /// Why, for people.
    pub text: &'a str,
}

impl<'a> Handover<'a> {
    pub(super) fn decode(mut fields: Fields<'a>) -> Result<Self, WireError> {
        let value = fields.u32()?;
        let step = Step::from_code(fields.u16()?);
        let length = usize::from(fields.u16()?);
        let text = fields.text("text", length, MAX_TEXT)?;
        fields.end()?;
        Ok(Self { step, value, text })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.value.to_le_bytes());
        out.extend_from_slice(&self.step.code().to_le_bytes());
        put_text(out, self.text);
    }
}
