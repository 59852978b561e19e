use super::super::*;
use super::{decode, encode, split};
use crate::units::{PageIndex, PageRange};

const ALL: Features = Features::ALL;

/// An `Incoming` that is open, and its peer's `Outgoing`.
fn open(channel: ChannelKind, sender: Role, features: Features) -> Incoming {
    let mut incoming = Incoming::acceptor();
    incoming.open(channel, sender, features);
    incoming
}

fn header_of(outgoing: &mut Outgoing, message: &Message<'_>) -> Header {
    let mut frame = Vec::new();
    outgoing.append(message, &mut frame).unwrap();
    Header::decode(split(&frame).0).unwrap()
}

fn zero(id: u64) -> Message<'static> {
    Message::Zero(Zero {
        request: RequestId(id),
        range: PageRange::single(PageIndex(1)),
        epoch: Epoch(0),
    })
}

fn hello() -> Hello<'static> {
    Hello {
        version: VERSION,
        features: Features::LZ4 | Features::PUSH,
        pages: None,
        epoch: Epoch(0),
        keep_alive_ms: 0,
        channel: ChannelKind::Demand,
        role: Role::Fetcher,
        session: SessionId::NEW,
        digest: None,
        image: "image",
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: VERSION,
        features: Features::LZ4,
        pages: 100,
        epoch: Epoch(0),
        keep_alive_ms: 1000,
        window: 16,
        session: SessionId([1; 16]),
        digest: None,
    }
}

const GOODBYE: Message<'static> = Message::Goodbye(Goodbye {
    reason: GoodbyeReason::Done,
    text: "",
});

#[test]
fn a_channel_begins_with_a_hello_and_its_answer() {
    let mut outgoing = Outgoing::default();
    let ping = header_of(&mut outgoing, &Message::Ping { token: 1 });
    assert!(matches!(
        Incoming::acceptor().accept(&ping),
        Err(WireError::Unexpected { .. })
    ));
    assert!(matches!(
        Incoming::connector().accept(&ping),
        Err(WireError::Unexpected { .. })
    ));

    let mut outgoing = Outgoing::default();
    let mut incoming = Incoming::acceptor();
    incoming
        .accept(&header_of(&mut outgoing, &Message::Hello(hello())))
        .unwrap();
    // Until it is welcome, nothing else may come.
    let early = header_of(&mut outgoing, &Message::Ping { token: 1 });
    assert!(matches!(
        incoming.accept(&early),
        Err(WireError::Unexpected { .. })
    ));

    let mut outgoing = Outgoing::default();
    let mut incoming = Incoming::connector();
    incoming
        .accept(&header_of(&mut outgoing, &Message::Welcome(welcome())))
        .unwrap();
    incoming.open(ChannelKind::Demand, Role::Provider, ALL);
    incoming.accept(&header_of(&mut outgoing, &zero(1))).unwrap();
    let again = header_of(&mut outgoing, &Message::Welcome(welcome()));
    assert!(matches!(
        incoming.accept(&again),
        Err(WireError::Unexpected { .. })
    ));
}

#[test]
fn frames_lost_doubled_or_out_of_order_are_noticed() {
    let mut outgoing = Outgoing::default();
    let headers: Vec<_> = (0..4)
        .map(|token| header_of(&mut outgoing, &Message::Ping { token }))
        .collect();
    let fresh = || open(ChannelKind::Control, Role::Fetcher, ALL);
    let mut incoming = fresh();
    for header in &headers {
        incoming.accept(header).unwrap();
    }
    for wrong in [[0, 0], [0, 2], [1, 0]] {
        let mut incoming = fresh();
        let all: Result<(), _> = wrong
            .iter()
            .try_for_each(|index| incoming.accept(&headers[*index]));
        assert!(matches!(all, Err(WireError::Sequence { .. })), "{wrong:?}");
    }
}

#[test]
fn sequence_numbers_wrap() {
    let mut outgoing = Outgoing { next: u32::MAX };
    let mut incoming = open(ChannelKind::Control, Role::Fetcher, ALL);
    incoming.next = u32::MAX;
    for token in 0..2 {
        incoming
            .accept(&header_of(&mut outgoing, &Message::Ping { token }))
            .unwrap();
    }
    assert_eq!((outgoing.next, incoming.next), (1, 1));
}

#[test]
fn each_side_sends_only_its_own_messages() {
    let request = [PageRange::single(PageIndex(1))];
    let request = Message::Request(Request {
        request: RequestId(1),
        ranges: (&request[..]).into(),
    });
    for channel in [ChannelKind::Demand, ChannelKind::Background, ChannelKind::Control] {
        for sender in [Role::Fetcher, Role::Provider] {
            for (message, from, on_control) in
                [(request, Role::Fetcher, false), (zero(1), Role::Provider, false)]
            {
                let header = header_of(&mut Outgoing::default(), &message);
                let allowed = sender == from && (on_control || channel != ChannelKind::Control);
                assert_eq!(open(channel, sender, ALL).accept(&header).is_ok(), allowed);
            }
        }
    }
}

#[test]
fn only_what_was_agreed_upon_may_come() {
    let range = [PageRange::single(PageIndex(1))];
    let cancel = Message::Cancel {
        ranges: (&range[..]).into(),
    };
    let discard = Message::Discard {
        epoch: Epoch(1),
        ranges: (&range[..]).into(),
    };
    let locality = Message::Locality { page: PageIndex(0) };
    for (message, sender, feature) in [
        (cancel, Role::Fetcher, Features::CANCEL),
        (discard, Role::Provider, Features::DISCARD),
        (locality, Role::Fetcher, Features::LOCALITY),
        (zero(0), Role::Provider, Features::PUSH),
    ] {
        let header = header_of(&mut Outgoing::default(), &message);
        open(ChannelKind::Background, sender, feature)
            .accept(&header)
            .unwrap();
        let without = Features(ALL.0 & !feature.0);
        assert_eq!(
            open(ChannelKind::Background, sender, without).accept(&header),
            Err(WireError::Feature { kind: message.kind() })
        );
    }
}

#[test]
fn after_a_goodbye_only_answers_come() {
    let after = |message: &Message<'_>, sender| {
        let mut outgoing = Outgoing::default();
        let mut incoming = open(ChannelKind::Demand, sender, ALL);
        incoming.accept(&header_of(&mut outgoing, &GOODBYE)).unwrap();
        assert!(incoming.is_draining());
        incoming.accept(&header_of(&mut outgoing, message))
    };
    after(&zero(1), Role::Provider).unwrap();
    after(&Message::BarrierAck { number: 1 }, Role::Fetcher).unwrap();
    after(&Message::Ping { token: 1 }, Role::Fetcher).unwrap();
    assert!(after(&zero(0), Role::Provider).is_err());
    assert!(after(&GOODBYE, Role::Provider).is_err());
    assert!(
        after(
            &Message::MetadataRequest {
                request: RequestId(1)
            },
            Role::Fetcher
        )
        .is_err()
    );
}

#[test]
fn a_welcome_must_fit_the_hello() {
    let asked = Hello {
        pages: Some(100),
        digest: Some([3; 32]),
        session: SessionId([1; 16]),
        ..hello()
    };
    let right = Welcome {
        digest: Some([3; 32]),
        ..welcome()
    };
    right.check(&asked).unwrap();
    welcome().check(&hello()).unwrap();
    for wrong in [
        Welcome { pages: 99, ..right },
        Welcome {
            digest: None,
            ..right
        },
        Welcome {
            features: Features::RECOVERY,
            ..right
        },
        Welcome {
            session: SessionId([2; 16]),
            ..right
        },
        Welcome {
            version: Version { major: 1, minor: 7 },
            ..right
        },
    ] {
        assert!(
            matches!(wrong.check(&asked), Err(WireError::Welcome { .. })),
            "{wrong:?}"
        );
    }
}

#[test]
fn another_major_version_is_told_from_nonsense() {
    let mut frame = encode(&Message::Hello(hello()));
    frame[HEADER_SIZE + 8] = 9;
    // What else such a hello holds is not looked at.
    frame[HEADER_SIZE + 12..].fill(0xff);
    let payload = &frame[HEADER_SIZE..];
    let header = Header::for_payload(MessageType::Hello, 0, payload);
    let error = Message::decode(&header, payload).unwrap_err();
    assert_eq!(error, WireError::Version(Version { major: 9, ..VERSION }));
    assert_eq!(error.refuse_code(), RefuseCode::WrongVersion);
}

#[test]
fn a_later_minor_version_may_say_more_in_its_hello() {
    let frame = encode(&Message::Hello(hello()));
    let mut payload = frame[HEADER_SIZE..].to_vec();
    payload.extend_from_slice(b"more");
    let header = Header::for_payload(MessageType::Hello, 0, &payload);
    assert_eq!(Message::decode(&header, &payload), Ok(Message::Hello(hello())));
    assert!(decode(&frame).is_ok());
}
