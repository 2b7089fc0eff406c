//! Clients in numbers, while servers are killed and frozen and their database crashes, at random.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::Mutex,
    task::{JoinSet, block_in_place},
    time::{sleep, sleep_until},
};

use crate::{
    Random, Run,
    books::{Audit, Books, Ledger, Poller},
    client::{Client, Order},
    report::Check,
    role::{FREEZE_AT, SLEEP_BEFORE_MS, SLEEP_INSIDE_MS},
    server,
    support::{
        postgres::Postgres,
        server::{Program, Server},
    },
    trap::Point,
};

/// What happens within its span.
#[derive(Clone, Debug)]
pub struct Storm {
    pub keys: usize,
    pub clients_per_key: usize,
    pub span: Duration,
    pub kills: usize,
    pub freezes: usize,
    /// Immediate stops of the database.
    pub crashes: usize,
    /// Handlers that freeze their process before they have a transaction.
    pub freezes_before_begin: usize,
    /// Handlers that take longer than the lease.
    pub slow_handlers: usize,
}

pub async fn run(run: &Run) {
    let storm = Storm {
        keys: run.count(2000),
        clients_per_key: 5,
        span: Duration::from_secs(if run.full { 120 } else { 15 }),
        kills: run.count(40),
        freezes: run.count(5),
        crashes: run.count(3),
        freezes_before_begin: run.count(5),
        slow_handlers: run.count(100),
    };
    let keys = Check::new(format!(
        "storm: one effect and one answer for each key ({} clients each, {} kills, {} freezes, {} crashes of the database)",
        storm.clients_per_key,
        storm.kills,
        storm.freezes + storm.freezes_before_begin,
        storm.crashes
    ));
    let polls = Check::new("storm: charges and records agree in every snapshot");
    storm.rage(server(), run.random("storm"), Some(&polls)).await.check("", &keys);
    keys.print();
    polls.print();
}

impl Storm {
    /// Lets it rage over two servers of this program, and returns what became of the keys.
    pub async fn rage(&self, program: Program, mut random: Random, polls: Option<&Check>) -> Audit {
        let site = Arc::new(block_in_place(|| Site::start(&program)));
        let books = Books::open(&site.postgres.url()).await;
        let poller = polls.map(|check| Poller::start(&books, check));
        let (ledger, client) = (Arc::new(Ledger::default()), Client::new(IMPATIENCE));
        let began = Instant::now();
        let mut events = JoinSet::new();
        for (event, count) in
            [(Event::Kill, self.kills), (Event::Freeze, self.freezes), (Event::Crash, self.crashes)]
        {
            for _ in 0..count {
                let at = began + self.span.mul_f64(0.05) + self.moment(&mut random).mul_f64(0.9);
                let (site, random) = (Arc::clone(&site), Random(random.below(u64::MAX)));
                events.spawn(async move {
                    sleep_until(at.into()).await;
                    site.happen(event, random).await;
                });
            }
        }
        let thaw = tokio::spawn(Arc::clone(&site).thaw());
        let clients = self.clients(&site, began, &client, &ledger, &mut random);
        events.join_all().await;
        clients.join_all().await;
        thaw.abort();
        if let Some(poller) = poller {
            poller.stop().await;
        }
        let audit = ledger.audit(&books).await;
        println!("storm: {} keys were taken over, clients were told {}", audit.taken_over, client.refusals());
        audit
    }

    /// Starts the clients, each of which sends its request at a moment of its own.
    fn clients(
        &self,
        site: &Site,
        began: Instant,
        client: &Client,
        ledger: &Arc<Ledger>,
        random: &mut Random,
    ) -> JoinSet<()> {
        let mut clients = JoinSet::new();
        for number in 0..self.keys {
            let at = began + self.moment(random);
            for duplicate in 0..self.clients_per_key {
                let order = self.order(number, duplicate, random);
                // The one that is to freeze its handler must be the first.
                let late = if duplicate > 0 && self.freezes_before_begin(number) { 50 } else { 0 };
                let at = at + Duration::from_millis(late + random.below(50));
                let addresses = site.addresses(random.below(2) == 0);
                let (client, ledger) = (client.clone(), Arc::clone(ledger));
                let until = began + self.span + PATIENCE;
                clients.spawn(async move {
                    sleep_until(at.into()).await;
                    let key = order.key.clone();
                    for _ in 0..if duplicate == 0 { 2 } else { 1 } {
                        ledger.note(&key, client.insist(&addresses, order.clone(), until).await);
                    }
                });
            }
        }
        clients
    }

    fn moment(&self, random: &mut Random) -> Duration {
        self.span * u32::try_from(random.below(10_000)).expect("it is below") / 10_000
    }

    fn freezes_before_begin(&self, number: usize) -> bool {
        self.freezes_before_begin > 0 && number.is_multiple_of(self.keys / self.freezes_before_begin)
    }

    fn is_slow(&self, number: usize) -> bool {
        self.slow_handlers > 0 && number % (self.keys / self.slow_handlers) == 1
    }

    fn order(&self, number: usize, duplicate: usize, random: &mut Random) -> Order {
        let order = Order::new(format!("storm-{number}"));
        if self.freezes_before_begin(number) {
            return if duplicate == 0 { order.with(FREEZE_AT, Point::Entered.name()) } else { order };
        }
        if self.is_slow(number) {
            return order.with(SLEEP_BEFORE_MS, 1200).with(SLEEP_INSIDE_MS, 600);
        }
        order.with(SLEEP_BEFORE_MS, random.below(30)).with(SLEEP_INSIDE_MS, random.below(400))
    }
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Kill,
    Freeze,
    Crash,
}

/// Two servers and their database. One thing at a time happens to each of them.
struct Site {
    servers: [Mutex<Server>; 2],
    addresses: [SocketAddr; 2],
    postgres: Postgres,
    crashing: Mutex<()>,
}

impl Site {
    fn start(program: &Program) -> Self {
        let postgres = Postgres::start();
        let start = || Server::start_program(program.clone(), Some(&postgres.url()), &[]);
        let servers = [start(), start()];
        let addresses = [servers[0].address(), servers[1].address()];
        Self { servers: servers.map(Mutex::new), addresses, postgres, crashing: Mutex::default() }
    }

    fn addresses(&self, swapped: bool) -> [SocketAddr; 2] {
        let [first, second] = self.addresses;
        if swapped { [second, first] } else { [first, second] }
    }

    async fn happen(&self, event: Event, mut random: Random) {
        let server = &self.servers[usize::from(random.below(2) == 0)];
        let more = Duration::from_millis(random.below(800));
        match event {
            Event::Kill => {
                let mut server = server.lock().await;
                block_in_place(|| {
                    server.kill9();
                    server.start_again();
                });
            }
            Event::Freeze => {
                let server = server.lock().await;
                server.stop();
                sleep(FROZEN + more).await;
                server.cont();
            }
            Event::Crash => {
                let _alone = self.crashing.lock().await;
                block_in_place(|| self.postgres.stop_immediate());
                sleep(more).await;
                block_in_place(|| self.postgres.start_again());
            }
        }
    }

    /// Lets servers go on that have frozen themselves, after their leases have run out.
    async fn thaw(self: Arc<Self>) {
        let mut since = [None; 2];
        loop {
            for (server, since) in self.servers.iter().zip(&mut since) {
                // Whoever has it locked lets it go on itself.
                let Ok(server) = server.try_lock() else { continue };
                if !server.is_stopped() {
                    *since = None;
                } else if since.get_or_insert_with(Instant::now).elapsed() > FROZEN {
                    server.cont();
                }
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Longer than the lease.
const FROZEN: Duration = Duration::from_millis(1800);
/// Clients give a frozen server up before it goes on, and one that runs a slow handler too.
const IMPATIENCE: Duration = Duration::from_millis(700);
const PATIENCE: Duration = Duration::from_secs(60);
