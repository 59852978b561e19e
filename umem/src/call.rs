//! The beginning of a channel: who calls says hello, who is called welcomes or refuses.

use std::sync::Arc;

use crate::channel::{ChannelError, Receiver, Sender};
use crate::link::Stream;
use crate::wire::{Hello, Incoming, Message, RefuseCode, Welcome};

/// A channel on which both sides have said what they are.
#[derive(Debug)]
pub struct Opened {
    /// What goes out.
    pub sender: Sender,
    /// What comes in.
    pub receiver: Receiver,
    /// The connection below.
    pub stream: Arc<Stream>,
    /// What was agreed upon.
    pub welcome: Welcome,
}

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Who was called does not want it.
    #[error("refused: {code}{}{text}", if text.is_empty() { "" } else { ": " })]
    Refused {
        /// Why.
        code: RefuseCode,
        /// Why, in its words.
        text: String,
    },
    /// The channel ended before it began.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// Opens a channel on a connection that this side has made. Waits for the answer as long as the connection's time-outs say.
pub fn call(stream: Stream, hello: &Hello<'_>) -> Result<Opened, CallError> {
    let stream = Arc::new(stream);
    let mut sender = Sender::new(Arc::clone(&stream));
    let mut receiver = Receiver::new(Arc::clone(&stream), Incoming::connector());
    let sent = sender.send(&Message::Hello(*hello));
    let welcome = match (receiver.receive(), sent) {
        (Ok(Message::Welcome(welcome)), _) => welcome,
        (Ok(Message::Refused(refused)), _) => {
            return Err(CallError::Refused {
                code: refused.code,
                text: refused.text.to_owned(),
            });
        }
        // Who closed has most often said why before, which says more than that nothing can be sent.
        (Err(ChannelError::Closed), Err(error)) | (Err(error), _) => return Err(error.into()),
        // `Incoming` lets nothing else through.
        (Ok(_), _) => return Err(ChannelError::Closed.into()),
    };
    welcome.check(hello).map_err(ChannelError::from)?;
    receiver
        .incoming
        .open(hello.channel, hello.role.peer(), welcome.features);
    Ok(Opened {
        sender,
        receiver,
        stream,
        welcome,
    })
}
