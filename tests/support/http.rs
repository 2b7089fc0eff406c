//! HTTP clients: one that sends and shows exact bytes, and hyper's for HTTP/1.1 and HTTP/2.

use std::{io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response,
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

/// A response as it was on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawResponse {
    /// The status code.
    pub status: u16,
    /// The status line without its end.
    pub status_line: Vec<u8>,
    /// The header lines in their order, with names as they were written.
    pub headers: Vec<RawField>,
    /// The body without its framing.
    pub body: Vec<u8>,
    /// The lines after the last chunk.
    pub trailers: Vec<RawField>,
    /// Everything, as it was sent.
    pub bytes: Vec<u8>,
}

/// A header line: name and value without the space around the value.
pub type RawField = (Vec<u8>, Vec<u8>);

impl RawResponse {
    /// The values of all lines of this name, in any case.
    pub fn values(&self, name: &str) -> Vec<&[u8]> {
        values(&self.headers, name).collect()
    }

    /// The value of the only line of this name, as text.
    #[track_caller]
    pub fn header(&self, name: &str) -> Option<&str> {
        let values = self.values(name);
        assert!(values.len() < 2, "{name} occurs {} times", values.len());
        values.first().map(|value| std::str::from_utf8(value).expect("the value is UTF-8"))
    }

    /// Everything as it was sent, but for the header lines of these names. Readable, and equal only if the bytes are.
    pub fn bytes_without(&self, names: &[&str]) -> String {
        let end =
            self.bytes.windows(4).position(|end| end == b"\r\n\r\n").expect("a response has a head") + 2;
        let (head, rest) = self.bytes.split_at(end);
        let is_left_out = |line: &&[u8]| {
            let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
            names.iter().any(|left_out| left_out.as_bytes().eq_ignore_ascii_case(name))
        };
        let lines = head.split_inclusive(|byte| *byte == b'\n').filter(|line| !is_left_out(line));
        [&lines.collect::<Vec<_>>().concat(), rest].concat().escape_ascii().to_string()
    }

    /// Whether the layer marked it as a replay.
    #[track_caller]
    pub fn is_replay(&self) -> bool {
        self.header("idempotent-replayed").is_some_and(|value| value == "true")
    }

    /// The body as text.
    #[track_caller]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the body is UTF-8")
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("the body is JSON")
    }
}

/// A connection for HTTP/1.1 on which the test writes every byte itself.
#[derive(Debug)]
pub struct RawConnection {
    stream: BufReader<TcpStream>,
    read: Vec<u8>,
}

impl RawConnection {
    /// Connects.
    pub async fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("the server accepts connections");
        stream.set_nodelay(true).expect("a connection can be configured");
        Self { stream: BufReader::new(stream), read: Vec::new() }
    }

    /// Sends these bytes.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.expect("the server reads");
    }

    /// Reads one response, to its end.
    pub async fn read(&mut self) -> RawResponse {
        self.read_response(false).await
    }

    /// Reads one response to `HEAD`, which has no body whatever its headers say.
    pub async fn read_head(&mut self) -> RawResponse {
        self.read_response(true).await
    }

    /// Reads one chunk of a body whose head was read; `None` for the last, empty one. Trailers are left unread.
    pub async fn read_chunk(&mut self) -> Option<Vec<u8>> {
        let line = String::from_utf8(self.line().await).expect("a chunk's size is ASCII");
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).expect("a chunk's size is a hexadecimal number");
        if size == 0 {
            return None;
        }
        let chunk = self.exactly(size).await;
        assert_eq!(self.line().await, b"", "a chunk ends with its size");
        Some(chunk)
    }

    /// Waits until the server closes the connection. Returns what it still sent.
    pub async fn read_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let read = timeout(PATIENCE, self.stream.read_to_end(&mut bytes)).await;
        assert!(read.is_ok(), "the server does not close the connection");
        bytes
    }

    /// Says that nothing more will be sent, and goes on reading.
    pub async fn finish_sending(&mut self) {
        self.stream.shutdown().await.expect("the connection is open");
    }

    /// Leaves with a reset instead of a regular end.
    pub fn reset(self) {
        self.stream.into_inner().set_zero_linger().expect("a connection can be configured");
    }

    async fn read_response(&mut self, head_only: bool) -> RawResponse {
        self.read.clear();
        let status_line = self.line().await;
        let code = status_line.split(|byte| *byte == b' ').nth(1).map(String::from_utf8_lossy);
        let status = code.and_then(|code| code.parse().ok());
        let status =
            status.unwrap_or_else(|| panic!("no status line: {:?}", String::from_utf8_lossy(&status_line)));
        let headers = self.fields().await;
        let mut response = RawResponse {
            status,
            status_line,
            headers,
            body: Vec::new(),
            trailers: Vec::new(),
            bytes: Vec::new(),
        };
        if !head_only && !matches!(status, 100..=199 | 204 | 304) {
            self.read_body(&mut response).await;
        }
        response.bytes = self.read.clone();
        response
    }

    async fn read_body(&mut self, response: &mut RawResponse) {
        if response.values("transfer-encoding").contains(&&b"chunked"[..]) {
            while let Some(chunk) = self.read_chunk().await {
                response.body.extend(chunk);
            }
            response.trailers = self.fields().await;
        } else if let Some(length) = response.header("content-length") {
            let length = length.parse().expect("the content length is a number");
            response.body = self.exactly(length).await;
        } else {
            in_time(self.stream.read_to_end(&mut response.body))
                .await
                .expect("the body ends with the connection");
            self.read.extend(&response.body);
        }
    }

    async fn fields(&mut self) -> Vec<RawField> {
        let mut fields = Vec::new();
        loop {
            let line = self.line().await;
            if line.is_empty() {
                return fields;
            }
            let colon = line.iter().position(|byte| *byte == b':').expect("a header line has a colon");
            fields.push((line[..colon].to_vec(), line[colon + 1..].trim_ascii().to_vec()));
        }
    }

    async fn line(&mut self) -> Vec<u8> {
        let mut line = Vec::new();
        in_time(self.stream.read_until(b'\n', &mut line)).await.expect("the server sends a line");
        self.read.extend(&line);
        let Some(line) = line.strip_suffix(b"\r\n") else {
            panic!("the connection ended within a line: {:?}", String::from_utf8_lossy(&line));
        };
        line.to_vec()
    }

    async fn exactly(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        in_time(self.stream.read_exact(&mut bytes)).await.expect("the server sends the whole body");
        self.read.extend(&bytes);
        bytes
    }
}

/// Sends these bytes on a connection of their own and reads one response.
pub async fn exchange(address: SocketAddr, request: impl AsRef<[u8]>) -> RawResponse {
    let mut connection = RawConnection::open(address).await;
    connection.send(request).await;
    connection.read().await
}

/// The bytes of a request with a body and its length, on a connection that is kept open.
pub fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let mut head =
        format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    format!("{head}\r\n{body}").into_bytes()
}

/// The bytes of a `POST` with a key to the path that [`App`](super::app::App) serves.
pub fn post(key: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    request("POST", "/charges", &[&[("idempotency-key", key)], headers].concat(), body)
}

/// The bytes of such a `POST` whose body is sent in these chunks.
pub fn post_chunked(key: &str, chunks: &[&str]) -> Vec<u8> {
    let mut bytes = format!(
        "POST /charges HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\nidempotency-key: {key}\r\n\r\n"
    );
    for chunk in chunks {
        bytes.push_str(&format!("{:x}\r\n{chunk}\r\n", chunk.len()));
    }
    format!("{bytes}0\r\n\r\n").into_bytes()
}

/// A connection of hyper's client, in either version of HTTP. The clones of one for HTTP/2 share it.
#[derive(Debug)]
pub enum Client {
    /// HTTP/1.1.
    Http1(http1::SendRequest<Full<Bytes>>),
    /// HTTP/2 without TLS and without an upgrade.
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Client {
    /// Connects for HTTP/1.1.
    pub async fn http1(address: SocketAddr) -> Self {
        let (sender, connection) =
            http1::handshake(connect(address).await).await.expect("the server speaks HTTP/1.1");
        tokio::spawn(connection);
        Self::Http1(sender)
    }

    /// Connects for HTTP/2.
    pub async fn http2(address: SocketAddr) -> Self {
        let handshake = http2::handshake(TokioExecutor::new(), connect(address).await);
        let (sender, connection) = handshake.await.expect("the server speaks HTTP/2");
        tokio::spawn(connection);
        Self::Http2(sender)
    }

    /// Another handle to the same connection.
    ///
    /// # Panics
    ///
    /// For HTTP/1.1, where there is only one request at a time.
    #[track_caller]
    pub fn share(&self) -> Self {
        match self {
            Self::Http1(_) => panic!("a connection of HTTP/1.1 cannot be shared"),
            Self::Http2(sender) => Self::Http2(sender.clone()),
        }
    }

    /// Sends a request and reads the response's head.
    ///
    /// For HTTP/1.1 the URI is a path; for HTTP/2 it has scheme and authority.
    pub async fn start(&mut self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }

    /// Sends a request and reads the whole response, trailers included.
    pub async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Response<http_body_util::Collected<Bytes>> {
        let (parts, body) = self.start(request).await.expect("the server answers").into_parts();
        Response::from_parts(parts, body.collect().await.expect("the body is complete"))
    }
}

async fn connect(address: SocketAddr) -> TokioIo<TcpStream> {
    TokioIo::new(TcpStream::connect(address).await.expect("the server accepts connections"))
}

fn values<'a>(fields: &'a [RawField], name: &str) -> impl Iterator<Item = &'a [u8]> {
    fields
        .iter()
        .filter(move |(field, _)| field.eq_ignore_ascii_case(name.as_bytes()))
        .map(|(_, value)| value.as_slice())
}

/// Tests end, also those that wait for what does not come.
async fn in_time<T>(read: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(PATIENCE, read).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

const PATIENCE: Duration = Duration::from_secs(60);
