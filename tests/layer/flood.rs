//! A flood of large uploads does not take the server's memory.
//!
//! The server is a process of its own, this test's program once more, so that its peak is its own.

#![cfg(target_os = "linux")]

use std::{
    env, fs,
    future::pending,
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use axum::{Router, extract::Request, http::StatusCode, routing::post};
use http_body_util::BodyExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, tcp::WriteHalf},
    sync::Barrier,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::support::{
    http::{exchange, post as charge},
    served::{layer, serve},
};

const UPLOADS: usize = 200;
const UPLOAD: usize = 64 * MEBIBYTE;
/// The default of `with_buffer_limit`.
const TOTAL_LIMIT: usize = 64 * MEBIBYTE;
/// For what is not a body: buffers of connections, tasks, what the allocator keeps.
const SLACK: usize = 64 * MEBIBYTE;
const MEBIBYTE: usize = 1024 * 1024;

#[test]
fn many_large_uploads_with_a_length_stay_within_the_limit() {
    within_the_limit("flood::many_large_uploads_with_a_length_stay_within_the_limit", Framing::Length);
}

#[test]
fn many_large_uploads_in_chunks_stay_within_the_limit() {
    within_the_limit("flood::many_large_uploads_in_chunks_stay_within_the_limit", Framing::Chunked);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Length,
    Chunked,
}

fn within_the_limit(test: &str, framing: Framing) {
    if env::var_os(SERVE).is_some() {
        return serve_until_input_ends();
    }
    let server = ServerProcess::start(test);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        assert_eq!(exchange(server.address, charge("warm-up", &[], "2000")).await.status, 201);
        let before = server.memory("VmRSS");
        let statuses = timeout(PATIENCE, upload_all(server.address, framing)).await.unwrap();
        let peak = server.memory("VmHWM");
        let allowed = before + TOTAL_LIMIT + SLACK;
        println!("{framing:?}: {before} bytes before, {peak} at the peak, {allowed} allowed, {statuses:?}");
        assert!(peak < allowed, "{framing:?}: {before} bytes before, {peak} at the peak, {allowed} allowed");
        assert_eq!(statuses.len(), UPLOADS);
        assert!(statuses.iter().all(|status| [201, 413, 503].contains(status)), "{statuses:?}");
        if framing == Framing::Length {
            assert!(statuses.contains(&201), "room for one was there");
        }
        // Room is given back: one upload of the full size fits again.
        let stream = TcpStream::connect(server.address).await.unwrap();
        let last = timeout(PATIENCE, upload(stream, "last", framing)).await.unwrap();
        assert_eq!(last, (201, UPLOAD.to_string()));
    });
}

/// All uploads at once, each with a key of its own. Returns what they were answered.
async fn upload_all(address: SocketAddr, framing: Framing) -> Vec<u16> {
    let together = Arc::new(Barrier::new(UPLOADS));
    let mut uploads = JoinSet::new();
    for number in 0..UPLOADS {
        let together = Arc::clone(&together);
        uploads.spawn(async move {
            let stream = TcpStream::connect(address).await.expect("the server accepts connections");
            together.wait().await;
            upload(stream, &format!("upload-{number}"), framing).await.0
        });
    }
    uploads.join_all().await
}

/// Sends as much as the server takes, and reads its answer meanwhile: status and body.
async fn upload(mut stream: TcpStream, key: &str, framing: Framing) -> (u16, String) {
    let (mut from, mut to) = stream.split();
    let mut answer = Vec::new();
    tokio::select! {
        // Ends with an error where the server closes without reading the rest. What it said before is there.
        _ = from.read_to_end(&mut answer) => {}
        () = send(&mut to, key, framing) => {}
    }
    let answer = String::from_utf8(answer).expect("the answer is text");
    let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no answer to {key} but {answer:?}"));
    (status, answer.split_once("\r\n\r\n").unwrap_or_default().1.to_owned())
}

/// Sends an upload from one buffer that all share, then waits for ever.
async fn send(to: &mut WriteHalf<'_>, key: &str, framing: Framing) {
    static PIECE: [u8; 64 * 1024] = [b'x'; 64 * 1024];
    let framing_line = match framing {
        Framing::Length => format!("content-length: {UPLOAD}"),
        Framing::Chunked => "transfer-encoding: chunked".to_owned(),
    };
    let head = format!(
        "POST /charges HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nidempotency-key: {key}\r\n{framing_line}\r\n\r\n"
    );
    // An error says that the server reads no more: its answer tells why.
    let _ = async {
        to.write_all(head.as_bytes()).await?;
        for _ in 0..UPLOAD / PIECE.len() {
            match framing {
                Framing::Length => to.write_all(&PIECE).await?,
                Framing::Chunked => {
                    to.write_all(format!("{:x}\r\n", PIECE.len()).as_bytes()).await?;
                    to.write_all(&PIECE).await?;
                    to.write_all(b"\r\n").await?;
                }
            }
        }
        if framing == Framing::Chunked { to.write_all(b"0\r\n\r\n").await } else { Ok(()) }
    }
    .await;
    pending().await
}

/// This program as a server. Dropped, it is killed.
struct ServerProcess {
    process: Child,
    address: SocketAddr,
}

impl ServerProcess {
    fn start(test: &str) -> Self {
        let program = env::current_exe().expect("a test has a program");
        let mut process = Command::new(program)
            .args([test, "--exact", "--nocapture"])
            .env(SERVE, "1")
            // As it is by default, glibc raises this threshold and keeps the holes that growing buffers leave: the peak
            // would be as much its work as the server's.
            .env("MALLOC_MMAP_THRESHOLD_", "131072")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program can be run");
        let output = BufReader::new(process.stdout.take().expect("it is a pipe"));
        let address = output.lines().map_while(Result::ok).find_map(|line| {
            let (_, address) = line.split_once(LISTENING)?;
            address.parse().ok()
        });
        Self { address: address.expect("the server listens"), process }
    }

    /// A number of bytes from `/proc/PID/status`.
    fn memory(&self, name: &str) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<usize>().ok());
        kibibytes.expect("the kernel tells the memory of a process") * 1024
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the process does. It ends by itself when the test's process does.
fn serve_until_input_ends() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let handler = |request: Request| async move {
            let body = request.into_body().collect().await.expect("the body is in memory").to_bytes();
            sleep(Duration::from_millis(100)).await;
            (StatusCode::CREATED, body.len().to_string())
        };
        let layer = layer().with_request_body_limit(UPLOAD);
        let address = serve(Router::new().route("/charges", post(handler)).layer(layer)).await;
        println!("{LISTENING}{address}");
        let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
    });
    // Whatever still runs is of no interest.
    std::process::exit(0);
}

/// Far longer than what is waited for takes.
const PATIENCE: Duration = Duration::from_secs(120);
const SERVE: &str = "TOWER_IDEMPOTENCY_TEST_SERVES";
const LISTENING: &str = "listening on ";
