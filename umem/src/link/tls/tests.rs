use super::*;
use crate::link::test_credentials::Authority;
use crate::link::{Address, Listener, Stream};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use rustls::pki_types::pem::PemObject;
use std::io::{ErrorKind, IoSlice, Write};
use std::thread;

const PATIENCE: Duration = Duration::from_secs(30);

fn listen(credentials: Option<Credentials>) -> (Listener, Address) {
    let listener = Listener::bind_with(&"tcp:127.0.0.1:0".parse().unwrap(), credentials).unwrap();
    let address = listener.address().unwrap();
    (listener, address)
}

/// The two ends of a connection, the client's first.
fn pair() -> (Stream, Stream) {
    let authority = Authority::new("CA");
    let (listener, address) = listen(Some(authority.credentials("127.0.0.1")));
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            let server = listener.accept().unwrap();
            server.handshake(PATIENCE).unwrap();
            server
        });
        let client = Stream::connect(&address, PATIENCE, Some(&authority.credentials("client"))).unwrap();
        (client, server.join().unwrap())
    })
}

/// What each side says when they do not come together. The client reads, because it learns only then that it is not welcome.
fn strangers(client: Option<&Credentials>, server: Option<Credentials>) -> [String; 2] {
    let (listener, address) = listen(server);
    thread::scope(|scope| {
        let server = scope.spawn(move || {
            let stream = listener.accept().unwrap();
            stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
            let result = stream.handshake(PATIENCE);
            chain(
                &result
                    .and_then(|()| (&stream).read_exact(&mut [0; 1]))
                    .unwrap_err(),
            )
        });
        let client = Stream::connect(&address, PATIENCE, client).and_then(|stream| {
            stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
            (&stream).read_exact(&mut [0; 1])
        });
        [chain(&client.unwrap_err()), server.join().unwrap()]
    })
}

fn chain(error: &io::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[test]
fn each_side_says_why_it_does_not_trust_the_other() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let good = ours.credentials("127.0.0.1");
    let expired = |authority: &Authority| {
        let directory = tempfile::tempdir().unwrap();
        authority.issue_until(directory.path(), "127.0.0.1", 2001);
        Credentials::load(directory.path()).unwrap()
    };
    // A client of ours that trusts them too, so that only the server has something to say.
    let disguised = |from: &Authority, trusting: &Authority| {
        let directory = tempfile::tempdir().unwrap();
        from.issue(directory.path(), "127.0.0.1");
        let other = tempfile::tempdir().unwrap();
        trusting.issue(other.path(), "127.0.0.1");
        std::fs::copy(other.path().join("ca.pem"), directory.path().join("ca.pem")).unwrap();
        Credentials::load(directory.path()).unwrap()
    };

    let [client, server] = strangers(Some(&good), Some(disguised(&theirs, &ours)));
    assert!(client.contains("not signed by the CA in ca.pem"), "{client}");
    assert!(
        server.contains("does not accept this side's certificate"),
        "{server}"
    );

    let [client, server] = strangers(Some(&disguised(&theirs, &ours)), Some(good.clone()));
    assert!(client.contains("not signed by the CA that it trusts"), "{client}");
    assert!(server.contains("not signed by the CA in ca.pem"), "{server}");

    let [client, server] = strangers(Some(&good), Some(expired(&ours)));
    assert!(
        client.contains("the other side's certificate has expired"),
        "{client}"
    );
    assert!(
        server.contains("this side's certificate, which has expired"),
        "{server}"
    );

    let [client, server] = strangers(Some(&expired(&ours)), Some(good.clone()));
    assert!(
        client.contains("this side's certificate, which has expired"),
        "{client}"
    );
    assert!(
        server.contains("the other side's certificate has expired"),
        "{server}"
    );

    let [client, server] = strangers(Some(&good), Some(ours.credentials("elsewhere.example")));
    assert!(
        client.contains("is for another host") && client.contains("127.0.0.1"),
        "{client}"
    );
    assert!(server.contains("does not accept"), "{server}");
}

#[test]
fn a_client_without_a_certificate_is_sent_away() {
    let authority = Authority::new("CA");
    let credentials = authority.credentials("127.0.0.1");
    let mut nobody = credentials.clone();
    let roots = rustls::RootCertStore {
        roots: {
            let directory = tempfile::tempdir().unwrap();
            authority.issue(directory.path(), "x");
            let mut roots = rustls::RootCertStore::empty();
            let pem = std::fs::read(directory.path().join("ca.pem")).unwrap();
            roots
                .add(rustls::pki_types::CertificateDer::from_pem_slice(&pem).unwrap())
                .unwrap();
            roots.roots
        },
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    nobody.client = Arc::new(
        rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth(),
    );
    let [client, server] = strangers(Some(&nobody), Some(credentials));
    assert!(client.contains("asks for a certificate"), "{client}");
    assert!(server.contains("has no certificate"), "{server}");
}

#[test]
fn one_side_without_tls_is_told_from_none() {
    let credentials = Authority::new("CA").credentials("127.0.0.1");
    let (listener, address) = listen(Some(credentials.clone()));
    thread::scope(|scope| {
        scope.spawn(|| {
            let client = Stream::connect(&address, PATIENCE, None).unwrap();
            (&client).write_all(b"umemwire, plainly").unwrap();
            let _ = (&client).read_to_end(&mut Vec::new());
        });
        let error = listener.accept().unwrap().handshake(PATIENCE).unwrap_err();
        assert!(error.to_string().contains("does not speak TLS"), "{error}");
    });
    let (listener, address) = listen(None);
    thread::scope(|scope| {
        scope.spawn(|| drop(listener.accept().unwrap()));
        let error = Stream::connect(&address, PATIENCE, Some(&credentials)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("does it speak TLS") || error.kind() == ErrorKind::ConnectionReset,
            "{text}"
        );
    });
}

/// Who says nothing, or says it byte by byte, is let go when the time is up.
#[test]
fn a_handshake_ends_in_time() {
    let credentials = Authority::new("CA").credentials("127.0.0.1");
    let (listener, address) = listen(Some(credentials.clone()));
    let silent = Stream::connect(&address, PATIENCE, None).unwrap();
    let server = listener.accept().unwrap();
    // Before it, nobody waits in vain.
    assert_eq!((&server).write(b"x").unwrap_err().kind(), ErrorKind::NotConnected);
    assert_eq!(
        (&server).read(&mut [0]).unwrap_err().kind(),
        ErrorKind::NotConnected
    );
    let error = server.handshake(Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    drop(silent);

    let Address::Tcp(host_and_port) = &address else {
        panic!()
    };
    let slow = TcpStream::connect(host_and_port).unwrap();
    let server = listener.accept().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            // The header of a record of 16 KiB, and then its content, one byte at a time, for as long as it is taken.
            let _ = (&slow).write_all(&[0x16, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc]);
            while (&slow).write_all(&[0]).is_ok() {
                thread::sleep(Duration::from_millis(1));
            }
        });
        let since = Instant::now();
        let error = server.handshake(Duration::from_millis(200)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(since.elapsed() < PATIENCE);
        drop(server);
    });

    // The other way round: a server that takes the connection and says nothing.
    let (_listener, address) = listen(None);
    let error = Stream::connect(&address, Duration::from_millis(50), Some(&credentials)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
}

#[test]
fn an_end_that_was_announced_differs_from_one_that_was_not() {
    let (client, server) = pair();
    server.shutdown().unwrap();
    assert_eq!((&client).read(&mut [0; 10]).unwrap(), 0);

    let (client, server) = pair();
    let Stream::Tls(server) = server else { panic!() };
    server.tcp().shutdown(Shutdown::Both).unwrap();
    let error = (&client).read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
}

/// A byte that was changed on the way ends the connection, and is never read.
#[test]
fn a_changed_byte_is_found() {
    let (client, server) = pair();
    let (Stream::Tls(raw), Stream::Tls(_)) = (&client, &server) else {
        panic!()
    };
    // A record of application data that nobody encrypted.
    let mut tcp = raw.tcp();
    tcp.write_all(&[&[0x17, 3, 3, 0, 64][..], &[7; 64]].concat())
        .unwrap();
    let error = (&server).read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
    let error = (&client).read(&mut [0; 10]).unwrap_err();
    assert!(chain(&error).contains("BadRecordMac"), "{error}");
}

fn pattern(at: usize, seed: usize) -> u8 {
    (at.wrapping_mul(0x9e37_79b1).wrapping_add(seed) >> 8) as u8
}

/// Both directions are full at the same time, for as long as it takes: with one lock for both directions, or with a reader
/// that writes, each side would wait for the other for ever.
#[test]
fn two_sides_that_write_all_they_can_both_read() {
    const BYTES: usize = 8 << 20;
    let (client, server) = pair();
    for stream in [&client, &server] {
        // Much less than is written, and more than a segment of the loopback interface, below which TCP waits at each.
        set_socket_send_buffer_size(stream, 128 << 10).unwrap();
        set_socket_recv_buffer_size(stream, 128 << 10).unwrap();
        // Long enough for a slow machine; the test fails by it.
        stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
    }
    let write = |stream: &Stream, seed: usize| {
        let bytes: Vec<u8> = (0..BYTES).map(|at| pattern(at, seed)).collect();
        let mut stream = stream;
        for (index, chunk) in bytes.chunks(100_000).enumerate() {
            let (first, second) = chunk.split_at(chunk.len() / 3);
            if index % 2 == 0 {
                stream.write_all(chunk).unwrap();
            } else {
                stream.write_all(first).unwrap();
                stream.write_all(second).unwrap();
            }
        }
    };
    let read = |stream: &Stream, seed: usize| {
        let mut stream = stream;
        let mut buffer = vec![0; 50_000];
        let mut at = 0;
        while at < BYTES {
            let count = stream.read(&mut buffer).unwrap();
            assert!(count > 0, "the end after {at} bytes");
            for (offset, byte) in buffer[..count].iter().enumerate() {
                assert_eq!(*byte, pattern(at + offset, seed), "byte {}", at + offset);
            }
            at += count;
        }
    };
    thread::scope(|scope| {
        let threads = [
            scope.spawn(|| write(&client, 1)),
            scope.spawn(|| write(&server, 2)),
        ];
        // Readers that begin only when both writers can go no further.
        for stream in [&client, &server] {
            let Stream::Tls(stream) = stream else { panic!() };
            while stream.outgoing.try_lock().is_ok() || rustix::io::ioctl_fionread(stream).unwrap() == 0 {
                thread::yield_now();
            }
        }
        scope.spawn(|| read(&client, 2));
        scope.spawn(|| read(&server, 1));
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// What cannot be sent at once is kept, in order, and who sends it does not wait.
#[test]
fn writing_without_waiting_loses_nothing() {
    let (client, server) = pair();
    set_socket_send_buffer_size(&client, 4096).unwrap();
    server.set_timeouts(Some(PATIENCE), None).unwrap();
    let mut sent = 0;
    loop {
        let bytes: Vec<u8> = (sent..sent + 10_000).map(|at| pattern(at, 3)).collect();
        match client.try_write(&[IoSlice::new(&bytes)]) {
            Ok(count) => sent += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
        assert!(sent < 1 << 30, "the socket is never full");
    }
    assert_eq!(client.try_flush().unwrap_err().kind(), ErrorKind::WouldBlock);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = vec![0; sent + 4];
            (&server).read_exact(&mut bytes).unwrap();
            assert!(
                bytes[..sent]
                    .iter()
                    .enumerate()
                    .all(|(at, byte)| *byte == pattern(at, 3))
            );
            assert_eq!(&bytes[sent..], b"last");
        });
        (&client).write_all(b"last").unwrap();
    });
}

/// A read that waited in vain in the middle of a record goes on where it was.
#[test]
fn a_read_that_timed_out_loses_nothing() {
    let (client, server) = pair();
    server.set_timeouts(Some(Duration::from_millis(1)), None).unwrap();
    let Stream::Tls(stream) = &client else { panic!() };
    let mut outgoing = stream.outgoing.lock().unwrap();
    stream
        .encrypt(&[IoSlice::new(b"one record")], &mut outgoing)
        .unwrap();
    let record = std::mem::take(&mut outgoing.bytes);
    let mut buffer = [0; 10];
    for byte in record {
        let error = (&server).read(&mut buffer).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        stream.tcp().write_all(&[byte]).unwrap();
    }
    assert_eq!((&server).read(&mut buffer).unwrap(), 10);
    assert_eq!(&buffer, b"one record");
}
