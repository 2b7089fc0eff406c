//! The driver: runs the pairs, round by round, and has the report written.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    time::timeout,
};

use crate::{
    Result,
    database::Database,
    load::{Keys, Plan, Sample, send_one},
    options::Options,
    pairs::{Before, Figure, Pair, Place, Side, all},
    report,
};

/// Keys of the replays of many keys.
pub const KEYS: u64 = 200_000;

/// The figures of one pair at one number of connections: subject and partner in each round.
pub struct Point {
    pub connections: usize,
    pub rounds: Vec<[Sample; 2]>,
    pub deadlocks: u64,
}

/// Median, least and greatest.
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub greatest: f64,
}

impl Point {
    /// Subject to partner, of each round.
    pub fn ratio(&self, figure: Figure) -> Spread {
        if figure == Figure::Deadlocks {
            let deadlocks = self.deadlocks as f64;
            return Spread { median: deadlocks, least: deadlocks, greatest: deadlocks };
        }
        let ratios = self.rounds.iter().map(|[subject, partner]| figure.of(subject) / figure.of(partner));
        let mut ratios: Vec<f64> = ratios.collect();
        ratios.sort_by(f64::total_cmp);
        Spread { median: ratios[ratios.len() / 2], least: ratios[0], greatest: ratios[ratios.len() - 1] }
    }

    /// The median of one side's figure; 0 is the subject.
    pub fn median(&self, side: usize, figure: impl Fn(&Sample) -> f64) -> f64 {
        let mut values: Vec<f64> = self.rounds.iter().map(|round| figure(&round[side])).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }

    pub fn failed(&self, side: usize) -> u64 {
        self.rounds.iter().map(|round| round[side].failed).sum()
    }
}

pub async fn drive(options: Options) -> Result<()> {
    let url = std::env::var("TEST_POSTGRES_URL").map_err(|_| "run it with scripts/bench")?;
    let server = Database::at(&url, "postgres")?;
    if server.text("SHOW fsync").await? != "on" {
        return Err("this PostgreSQL does not flush (fsync is off), so its figures mean nothing".into());
    }
    let directory = tempfile::tempdir()?;
    let sqlite_directory = directory.path().display().to_string();
    let redis = Redis::start(&sqlite_directory).await;
    let process = server.process().await?;
    let driver = Driver { options, url, server, process, redis, sqlite_directory };
    let begin = Instant::now();
    let mut measured = Vec::new();
    for pair in all(&driver.options.millions).into_iter().filter(|pair| driver.selects(pair)) {
        match driver.run(&pair).await {
            Ok(points) => measured.push((pair, points)),
            Err(error) => eprintln!("{} is not measured: {error}", pair.name),
        }
    }
    let setting = driver.setting(begin.elapsed()).await?;
    report::write(&measured, &setting, driver.options.into_guide)
}

struct Driver {
    options: Options,
    url: String,
    server: Database,
    /// The main process of PostgreSQL.
    process: u32,
    redis: Option<Redis>,
    sqlite_directory: String,
}

impl Driver {
    fn selects(&self, pair: &Pair) -> bool {
        let named = |name: &str| self.options.only.contains(&name.to_lowercase());
        self.options.only.is_empty() || named(pair.name) || pair.goals.iter().any(|goal| named(goal.name))
    }

    fn connections(&self, pair: &Pair) -> Vec<usize> {
        let of_goals = pair.connections.iter().filter(|count| {
            pair.goals.is_empty() && **count == 64
                || pair.goals.iter().any(|goal| goal.connections.contains(count))
        });
        match &self.options.connections {
            Some(connections) => connections.clone(),
            None if self.options.quick && pair.connections.len() > 1 => of_goals.copied().collect(),
            None => pair.connections.to_vec(),
        }
    }

    async fn run(&self, pair: &Pair) -> Result<Vec<Point>> {
        eprintln!("{}: {}: {} / {}", pair.name, pair.work, pair.subject.label, pair.partner.label);
        self.make_databases(pair).await?;
        let mut sides = Vec::new();
        for side in [&pair.subject, &pair.partner] {
            sides.push(self.start(side, pair.body).await?);
        }
        match pair.before {
            Before::Nothing => {}
            Before::Analyze => self.database(&pair.subject).execute("ANALYZE idempotency_records").await?,
            Before::Expire => self.database(&pair.subject).add_expired(1_000_000).await?,
        }
        let mut points = Vec::new();
        for connections in self.connections(pair) {
            match self.measure(pair, &sides, connections).await {
                Ok(point) => points.push(point),
                Err(error) => eprintln!("  {connections:5} connections are not measured: {error}"),
            }
        }
        drop(sides);
        if pair.before == Before::Expire {
            let left = self.database(&pair.subject).expired().await?;
            eprintln!("  {left} of a million expired records are left: with 0, the purge ended too early");
        }
        if pair.subject.place == Place::Postgres {
            // A connection reports what it has counted when it is closed.
            tokio::time::sleep(Duration::from_millis(500)).await;
            let deadlocks = self.database(&pair.subject).deadlocks().await?;
            points.iter_mut().for_each(|point| point.deadlocks = deadlocks);
        }
        Ok(points)
    }

    async fn measure(&self, pair: &Pair, sides: &[Vec<Server>], connections: usize) -> Result<Point> {
        let mut point = Point { connections, rounds: Vec::new(), deadlocks: 0 };
        for _ in 0..self.options.rounds {
            let subject = self.sample(&pair.subject, &sides[0], pair.body, connections).await?;
            let partner = self.sample(&pair.partner, &sides[1], pair.body, connections).await?;
            point.rounds.push([subject, partner]);
        }
        let Spread { median, least, greatest } = point.ratio(Figure::Throughput);
        eprintln!(
            "  {connections:5} connections: {median:6.2} × ({least:.2} to {greatest:.2}) {:8.0} / {:8.0} a second",
            point.median(0, |sample| sample.throughput),
            point.median(1, |sample| sample.throughput),
        );
        Ok(point)
    }

    async fn sample(
        &self,
        side: &Side,
        servers: &[Server],
        body: usize,
        connections: usize,
    ) -> Result<Sample> {
        let _purge = if side.purging { Some(start_purging(servers[0].port).await?) } else { None };
        let redis =
            self.redis.as_ref().filter(|_| side.place == Place::Redis).and_then(|redis| redis.child.id());
        let plan = Plan {
            ports: servers.iter().map(|server| server.port).collect(),
            connections,
            warm_up: self.options.warm_up,
            seconds: self.options.seconds,
            keys: side.keys,
            body,
            servers: servers.iter().filter_map(|server| server.child.id()).collect(),
            databases: if side.on_postgres() { vec![self.process] } else { redis.into_iter().collect() },
        };
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("load").arg(serde_json::to_string(&plan)?).stderr(Stdio::inherit()).kill_on_drop(true);
        let limit = Duration::from_secs_f64(plan.warm_up + plan.seconds + 60.0);
        let output = timeout(limit, command.output()).await??;
        if !output.status.success() {
            return Err(format!("the load failed on {}", side.label).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Starts the servers of one side and prepares what its keys need.
    async fn start(&self, side: &Side, body: usize) -> Result<Vec<Server>> {
        let place = self.place(side)?;
        let mut servers = Vec::new();
        for _ in 0..side.servers {
            servers.push(Server::start(side.role, &place).await?);
        }
        if matches!(side.keys, Keys::One | Keys::Many(_)) {
            expect_created(send_one(servers[0].port, body).await?)?;
        }
        if let (Keys::Many(keys), "layer") = (side.keys, side.role) {
            self.database(side).copy_record(keys).await?;
        }
        Ok(servers)
    }

    async fn make_databases(&self, pair: &Pair) -> Result<()> {
        self.server.execute("DROP DATABASE IF EXISTS fresh WITH (FORCE)").await?;
        self.server.execute("CREATE DATABASE fresh").await?;
        if pair.subject.place == Place::SlowPostgres {
            // The one that flushes waits before, while the others wait for it: as on a disk that takes longer.
            for setting in SLOW_FLUSHES {
                self.server.execute(&format!("ALTER DATABASE fresh SET {setting}")).await?;
            }
        }
        if let Place::Filled(million) = pair.subject.place {
            self.fill(&pair.subject, million).await?;
        }
        self.server.execute("CHECKPOINT").await
    }

    /// Makes the filled database, unless an earlier pair has.
    async fn fill(&self, side: &Side, million: f64) -> Result<()> {
        let name = database_of(side.place);
        let exists = format!("SELECT count(*)::text FROM pg_database WHERE datname = '{name}'");
        if self.server.text(&exists).await? == "1" {
            return Ok(());
        }
        self.server.execute(&format!("CREATE DATABASE {name}")).await?;
        let server = Server::start("layer", &self.place(side)?).await?;
        expect_created(send_one(server.port, 200).await?)?;
        drop(server);
        let begin = Instant::now();
        self.database(side).fill((million * 1e6) as u64).await?;
        eprintln!("  filled in {:.0} s", begin.elapsed().as_secs_f64());
        Ok(())
    }

    fn database(&self, side: &Side) -> Database {
        Database::at(&self.url, &database_of(side.place)).expect("the address was read before")
    }

    /// The address of a side's database, for its servers.
    fn place(&self, side: &Side) -> Result<String> {
        Ok(match side.place {
            Place::Memory => "memory".to_owned(),
            Place::Sqlite => {
                let file = format!("{}/{}.sqlite", self.sqlite_directory, side.role);
                for suffix in ["", "-wal", "-shm"] {
                    let _ = std::fs::remove_file(format!("{file}{suffix}"));
                }
                format!("sqlite:{file}")
            }
            Place::Redis => {
                let redis = self.redis.as_ref().ok_or("redis-server is not installed")?;
                format!("redis://127.0.0.1:{}", redis.port)
            }
            Place::Postgres | Place::SlowPostgres | Place::Filled(_) => {
                let end = self.url.rfind('/').ok_or("an address of a database")?;
                format!("{}/{}", &self.url[..end], database_of(side.place))
            }
        })
    }

    async fn setting(&self, took: Duration) -> Result<report::Setting> {
        let fresh = Database::at(&self.url, "fresh")?;
        for setting in SLOW_FLUSHES {
            let (name, _) = setting.split_once(' ').ok_or("a setting")?;
            self.server.execute(&format!("ALTER DATABASE fresh RESET {name}")).await?;
        }
        let commit = fresh.commit_time().await?;
        for setting in SLOW_FLUSHES {
            self.server.execute(&format!("ALTER DATABASE fresh SET {setting}")).await?;
        }
        Ok(report::Setting {
            postgres: self.server.text(SETTINGS).await?,
            redis: self.redis.as_ref().map(|redis| redis.version.clone()),
            commit,
            slow_commit: fresh.commit_time().await?,
            rounds: self.options.rounds,
            seconds: self.options.seconds,
            took,
        })
    }
}

impl Side {
    fn on_postgres(&self) -> bool {
        matches!(self.place, Place::Postgres | Place::SlowPostgres | Place::Filled(_))
    }
}

fn database_of(place: Place) -> String {
    match place {
        Place::Filled(million) => format!("filled_{}", (million * 1000.0) as u64),
        _ => "fresh".to_owned(),
    }
}

fn expect_created(status: u16) -> Result<()> {
    if status == 201 { Ok(()) } else { Err(format!("the first request got {status}").into()) }
}

/// The server purges for as long as the connection is open.
async fn start_purging(port: u16) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(b"GET /purge HTTP/1.1\r\nhost: localhost\r\n\r\n").await?;
    Ok(stream)
}

/// A server of an application, killed when dropped.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    async fn start(role: &str, place: &str) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child =
            command.args(["serve", role, place]).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
        let output = child.stdout.take().ok_or("the output is piped")?;
        let line = timeout(Duration::from_secs(60), BufReader::new(output).lines().next_line()).await??;
        let port = line.ok_or(format!("the server {role} did not start"))?.parse()?;
        Ok(Self { child, port })
    }
}

/// A Redis that writes nothing to disk, killed when dropped.
struct Redis {
    child: Child,
    port: u16,
    version: String,
}

impl Redis {
    async fn start(directory: &str) -> Option<Self> {
        let output = Command::new("redis-server").arg("--version").output().await.ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let version = text.split("v=").nth(1)?.split_whitespace().next()?.to_owned();
        let port = std::net::TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port();
        let mut command = Command::new("redis-server");
        command.args([
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]);
        let child =
            command.args(["--dir", directory]).stdout(Stdio::null()).kill_on_drop(true).spawn().ok()?;
        Some(Self { child, port, version })
    }
}

const SLOW_FLUSHES: [&str; 2] = ["commit_delay = 1000", "commit_siblings = 0"];

const SETTINGS: &str = "
SELECT 'PostgreSQL ' || split_part(current_setting('server_version'), ' ', 1)
    || string_agg(', `' || name || '` ' || current_setting(name), '' ORDER BY name)
FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'shared_buffers', 'synchronous_commit')";
