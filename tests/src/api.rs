//! The API of a running VM, spoken to byte by byte, and what `docs/openapi.json` says of it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;

use crate::program::{Finished, PATIENCE, Program};
use crate::scratch::Scratch;
use crate::vm::{RunningVm, Vm};

/// The document of the API.
pub fn document() -> &'static Value {
    static DOCUMENT: OnceLock<Value> = OnceLock::new();
    DOCUMENT.get_or_init(|| serde_json::from_str(include_str!("../../docs/openapi.json")).unwrap())
}

/// All that there is to ask for: method, path.
pub fn routes() -> Vec<(String, String)> {
    let paths = document()["paths"].as_object().unwrap();
    let of = |(path, operations): (&String, &Value)| -> Vec<(String, String)> {
        let methods = operations.as_object().unwrap().keys();
        methods
            .map(|method| (method.to_uppercase(), path.clone()))
            .collect()
    };
    paths.iter().flat_map(of).collect()
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    /// Its status code.
    pub status: u16,
    /// Its head, in small letters.
    pub head: String,
    /// Its body.
    pub body: Vec<u8>,
}

impl Reply {
    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// Checks that it is an error with this status, as errors are documented, that has these words in it.
    #[track_caller]
    pub fn assert_error(&self, status: u16, words: &[&str]) {
        let text = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, status, "{text}");
        assert!(
            self.head.contains("content-type: application/json"),
            "{}",
            self.head
        );
        let error = self.json();
        assert_is("Error", &error);
        let said: Vec<&str> = [&error["error"]]
            .into_iter()
            .chain(error["causes"].as_array().unwrap())
            .map(|text| text.as_str().unwrap())
            .collect();
        for (index, text) in said.iter().enumerate() {
            assert!(!said[..index].contains(text), "said twice: {said:?}");
        }
        for word in words {
            assert!(text.contains(word), "'{word}' is not in {text}");
        }
    }
}

/// Checks that a value is what the document says of this schema.
#[track_caller]
pub fn assert_is(schema: &str, value: &Value) {
    let document = document();
    let schema = serde_json::json!({
        "$ref": format!("#/components/schemas/{schema}"),
        "components": document["components"],
    });
    let validator = jsonschema::validator_for(&schema).unwrap();
    let wrong: Vec<String> = validator
        .iter_errors(value)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?} in {value:#}");
}

/// A VM's API.
#[derive(Debug)]
pub struct Api {
    socket: PathBuf,
    _scratch: Scratch,
}

impl Api {
    /// Starts a VM with an API, and waits until it answers.
    pub fn start(vm: Vm) -> (RunningVm, Self) {
        let scratch = Scratch::new();
        let socket = scratch.path("api");
        let vm = vm.option("--api-socket", &socket).start();
        let api = Self {
            socket,
            _scratch: scratch,
        };
        vm.wait_until("its API answers", |_| UnixStream::connect(&api.socket).is_ok());
        (vm, api)
    }

    /// The same, and waits until the guest has said this.
    pub fn start_until(vm: Vm, output: &str) -> (RunningVm, Self) {
        let (vm, api) = Self::start(vm);
        vm.wait_for_output(output);
        (vm, api)
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A connection.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Asks for something with this body.
    pub fn ask(&self, method: &str, path: &str, body: &[u8]) -> Reply {
        self.try_ask(method, path, body).unwrap()
    }

    /// The same of a VM that may end meanwhile.
    pub fn try_ask(&self, method: &str, path: &str, body: &[u8]) -> io::Result<Reply> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        // It may be refused before it is read.
        let _ = stream.write_all(body);
        Self::reply(stream)
    }

    /// Reads an answer to its end.
    pub fn reply(mut stream: UnixStream) -> io::Result<Reply> {
        let mut bytes = Vec::new();
        // A reset comes after all that was sent before it.
        let ended = stream.read_to_end(&mut bytes);
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
            ended?;
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok(Reply {
            status: status.ok_or(io::ErrorKind::InvalidData)?,
            head,
            body: bytes[end + 4..].to_vec(),
        })
    }

    /// What is asked for with GET, as JSON.
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        let reply = self.ask("GET", path, b"");
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()
    }

    /// `vm.info`, which is as documented.
    #[track_caller]
    pub fn info(&self) -> Value {
        let info = self.get("/api/v1/vm.info");
        assert_is("Info", &info);
        info
    }

    /// The VM's state.
    #[track_caller]
    pub fn state(&self) -> String {
        self.info()["state"].as_str().unwrap().to_owned()
    }

    /// `vm.counters`, which are as documented.
    #[track_caller]
    pub fn counters(&self) -> Value {
        let counters = self.get("/api/v1/vm.counters");
        assert_is("Counters", &counters);
        counters
    }

    /// PUT, which must be obeyed.
    #[track_caller]
    pub fn put(&self, path: &str) {
        let reply = self.ask("PUT", path, b"");
        assert_eq!(reply.status, 204, "{}", String::from_utf8_lossy(&reply.body));
        assert!(reply.body.is_empty());
    }

    /// Pauses the VM.
    #[track_caller]
    pub fn pause(&self) {
        self.put("/api/v1/vm.pause");
    }

    /// Lets it run on.
    #[track_caller]
    pub fn resume(&self) {
        self.put("/api/v1/vm.resume");
    }

    /// Ends it.
    #[track_caller]
    pub fn shutdown(&self) {
        self.put("/api/v1/vm.shutdown");
    }

    /// `umem ctl` with these arguments, to its end.
    pub fn ctl(&self, args: &[&str]) -> Finished {
        Program::umem(["ctl", "--api-socket"])
            .arg(&self.socket)
            .args(args)
            .run()
    }

    /// Listens to events.
    pub fn events(&self) -> EventStream {
        let mut stream = self.connect();
        stream
            .write_all(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(reader.read_line(&mut head).unwrap() > 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        EventStream { reader }
    }
}

/// Events as the API streams them.
#[derive(Debug)]
pub struct EventStream {
    reader: BufReader<UnixStream>,
}

impl EventStream {
    /// How long the next event may take.
    pub fn patience(&self, patience: Duration) {
        self.reader.get_ref().set_read_timeout(Some(patience)).unwrap();
    }

    /// Waits for the next event of this source and name.
    #[track_caller]
    pub fn wait_for(&mut self, source: &str, event: &str) -> Value {
        self.find(|found| found["source"] == source && found["event"] == event)
            .unwrap_or_else(|| panic!("no {source} {event}"))
    }
}

impl Iterator for EventStream {
    type Item = Value;

    /// The next event, which is as documented: a chunk with one line in it.
    fn next(&mut self) -> Option<Value> {
        let mut size = String::new();
        if self.reader.read_line(&mut size).unwrap() == 0 {
            return None;
        }
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        let mut chunk = vec![0; size + 2];
        self.reader.read_exact(&mut chunk).unwrap();
        if size == 0 {
            return None;
        }
        Some(event(std::str::from_utf8(&chunk[..size]).unwrap()))
    }
}

/// An event from its line.
#[track_caller]
pub fn event(line: &str) -> Value {
    let event = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert_is("Event", &event);
    event
}
