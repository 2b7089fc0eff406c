//! The load: a number of connections, each of which sends a request when it has the answer to the one before.

use std::{
    hash::{BuildHasher, RandomState},
    rc::Rc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::{JoinSet, LocalSet},
    time::sleep_until,
};

use crate::{Result, cpu};

#[derive(Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Ports of the servers; the connections are divided among them.
    pub ports: Vec<u16>,
    pub connections: usize,
    /// Seconds before the measurement.
    pub warm_up: f64,
    pub seconds: f64,
    pub keys: Keys,
    /// Bytes of a request's body.
    pub body: usize,
    /// The processes of the servers.
    pub servers: Vec<u32>,
    /// The processes of the databases, each counted with its children.
    pub databases: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Keys {
    None,
    /// Each request has a key of its own.
    Fresh,
    /// All have the same key.
    One,
    /// Each has one of so many keys, by chance.
    Many(u64),
}

/// The figures of one measurement.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Sample {
    pub requests: u64,
    /// Those that were answered with an error.
    pub failed: u64,
    /// Requests in a second.
    pub throughput: f64,
    /// In µs.
    pub p50: f64,
    /// In µs.
    pub p99: f64,
    /// µs of processor time for each request.
    pub server_cpu: f64,
    /// µs of processor time for each request.
    pub database_cpu: f64,
    /// µs of processor time for each request.
    pub load_cpu: f64,
}

/// Measures, and prints the sample.
pub async fn run(plan: Plan) -> Result<()> {
    let sample = LocalSet::new().run_until(measure(Rc::new(plan))).await?;
    println!("{}", serde_json::to_string(&sample)?);
    Ok(())
}

async fn measure(plan: Rc<Plan>) -> Result<Sample> {
    let mut streams = Vec::new();
    for port in plan.ports.iter().cycle().take(plan.connections) {
        streams.push(connect(*port).await?);
    }
    let begin = Instant::now() + Duration::from_secs_f64(plan.warm_up);
    let end = begin + Duration::from_secs_f64(plan.seconds);
    let mut connections = JoinSet::new();
    for stream in streams {
        connections.spawn_local(send_until(stream, Rc::clone(&plan), begin, end));
    }
    sleep_until(begin.into()).await;
    let before = used(&plan);
    sleep_until(end.into()).await;
    let after = used(&plan);
    let (mut times, mut failed) = (Vec::new(), 0);
    while let Some(connection) = connections.join_next().await {
        let (its_times, its_failed) = connection??;
        times.extend(its_times);
        failed += its_failed;
    }
    if times.is_empty() {
        return Err("no request was answered within the time of the measurement".into());
    }
    times.sort_unstable();
    let requests = times.len() as u64;
    let share = |share: usize| f64::from(times[(times.len() * share / 100).min(times.len() - 1)]);
    let each = |index: usize| (after[index] - before[index]) as f64 / requests as f64;
    Ok(Sample {
        requests,
        failed,
        throughput: requests as f64 / plan.seconds,
        p50: share(50),
        p99: share(99),
        server_cpu: each(0),
        database_cpu: each(1),
        load_cpu: each(2),
    })
}

/// Processor time of the servers, of the databases and of this process.
fn used(plan: &Plan) -> [u64; 3] {
    [
        plan.servers.iter().map(|process| cpu::of_process(*process)).sum(),
        plan.databases.iter().map(|process| cpu::of_family(*process)).sum(),
        cpu::of_process(std::process::id()),
    ]
}

async fn connect(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The µs of each request that was answered in the time of the measurement, and how many of them failed.
async fn send_until(
    mut stream: TcpStream,
    plan: Rc<Plan>,
    begin: Instant,
    end: Instant,
) -> Result<(Vec<u32>, u64)> {
    let mut request = Request::new(plan.keys, plan.body);
    let (mut times, mut failed, mut buffer) = (Vec::new(), 0, vec![0; 64 * 1024]);
    loop {
        request.renew_key();
        let sent = Instant::now();
        stream.write_all(&request.bytes).await?;
        let status = read_response(&mut stream, &mut buffer).await?;
        let now = Instant::now();
        if now >= end {
            return Ok((times, failed));
        }
        if now >= begin {
            times.push(u32::try_from((now - sent).as_micros())?);
            failed += u64::from(status >= 400);
        }
    }
}

/// Sends one request with the key that `Keys::One` has, and returns the status.
pub async fn send_one(port: u16, body: usize) -> Result<u16> {
    let request = Request::new(Keys::One, body);
    let mut stream = connect(port).await?;
    stream.write_all(&request.bytes).await?;
    read_response(&mut stream, &mut vec![0; 64 * 1024]).await
}

/// Reads one response to its end and returns its status. The buffer must have room for the head.
async fn read_response(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<u16> {
    let mut filled = 0;
    let (status, mut left) = loop {
        let read = stream.read(&mut buffer[filled..]).await?;
        if read == 0 {
            return Err("the server closed the connection".into());
        }
        filled += read;
        if let Some(end) = buffer[..filled].windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            let head = std::str::from_utf8(&buffer[..end])?;
            break (
                head.get(9..12).ok_or("a status line")?.parse()?,
                end + 4 + content_length(head)? - filled,
            );
        }
    };
    while left > 0 {
        let read = stream.read(buffer).await?;
        if read == 0 {
            return Err("the server closed the connection within a response".into());
        }
        left -= read;
    }
    Ok(status)
}

fn content_length(head: &str) -> Result<usize> {
    let value = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    Ok(value.ok_or("a response without content-length")?.parse()?)
}

struct Request {
    bytes: Vec<u8>,
    keys: Keys,
    key_at: usize,
    random: u64,
}

impl Request {
    fn new(keys: Keys, body: usize) -> Self {
        let key = match keys {
            Keys::None => "",
            Keys::Fresh => "00000000-0000-0000-0000-000000000000",
            Keys::One | Keys::Many(_) => FIRST_KEY,
        };
        let mut head =
            "POST /charges HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".to_owned();
        let key_at = head.len() + "idempotency-key: ".len();
        if keys != Keys::None {
            head += &format!("idempotency-key: {key}\r\n");
        }
        head += &format!("content-length: {body}\r\n\r\n");
        let bytes = [head.into_bytes(), crate::serve::charge(body)].concat();
        Self { bytes, keys, key_at, random: RandomState::new().hash_one(0) }
    }

    fn renew_key(&mut self) {
        match self.keys {
            Keys::None | Keys::One => {}
            Keys::Fresh => {
                let digits = format!("{:016x}{:016x}", self.next_random(), self.next_random());
                let (a, b, c, d, e) =
                    (&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]);
                self.put_key(&format!("{a}-{b}-{c}-{d}-{e}"));
            }
            Keys::Many(keys) => {
                let number = self.next_random() % keys;
                self.put_key(&format!("key-{}", FIRST_NUMBER + number));
            }
        }
    }

    fn put_key(&mut self, key: &str) {
        self.bytes[self.key_at..self.key_at + key.len()].copy_from_slice(key.as_bytes());
    }

    /// SplitMix64.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

/// Numbered keys begin here, so that all have the same length.
pub const FIRST_NUMBER: u64 = 1_000_000_000_000_000;
const FIRST_KEY: &str = "key-1000000000000000";
