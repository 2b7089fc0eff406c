//! A TCP proxy that does to a connection what networks do.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
};

/// What the proxy does, to the connections that are open and to those to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Passes everything on.
    None,
    /// Passes replies on that much later. Two that follow each other closely may wait twice as long.
    DelayReplies(Duration),
    /// Keeps replies until the fault changes, then passes them on in order.
    HoldReplies,
    /// As [`HoldReplies`](Self::HoldReplies), but on each connection only from a request on that holds these bytes,
    /// which is still passed on: the server does what it was asked, and nobody is told.
    HoldRepliesFrom(&'static [u8]),
    /// Keeps, on each connection, a request that holds these bytes and all that follow, until the fault changes.
    HoldRequestsFrom(&'static [u8]),
    /// Refuses new connections, as if nobody listened. Leaves open ones alone.
    Refuse,
    /// Passes that many bytes of each connection's requests on, counted from now, and loses the rest in silence.
    LoseRequestsAfter(usize),
    /// Passes that many bytes of each connection's replies on, counted from now, and loses the rest in silence.
    LoseRepliesAfter(usize),
}

/// What the proxy has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections accepted so far.
    pub accepted: usize,
    /// Connections that are open.
    pub open: usize,
    /// Connections that are open and on which something is being kept or was lost.
    pub withheld: usize,
}

/// Listens on a port of its own and passes connections on to a target. It runs in a thread of its own, so that its
/// calls need no runtime. Dropped, it closes everything.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    control: watch::Sender<Control>,
    counts: watch::Receiver<Counts>,
}

impl Proxy {
    /// Starts a proxy without a fault.
    #[track_caller]
    pub fn start(target: SocketAddr) -> Self {
        let (control, control_changes) = watch::channel(Control { fault: Fault::None, setting: 1, cuts: 0 });
        let (counts, count_changes) = watch::channel(Counts::default());
        let (send_address, address) = mpsc::channel();
        let network = Network { target, control: control_changes, counts: Arc::new(counts) };
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime can be built").block_on(network.serve(&send_address));
        });
        Self { address: address.recv().expect("the proxy can listen"), control, counts: count_changes }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what it does. A refusal of connections, and its end, takes effect a moment later.
    pub fn set(&self, fault: Fault) {
        self.control.send_modify(|control| {
            control.fault = fault;
            control.setting += 1;
        });
    }

    /// Resets the connections that are open, and loses what was kept. New ones are as before.
    pub fn cut(&self) {
        self.control.send_modify(|control| control.cuts += 1);
    }

    /// What it has seen until now.
    pub fn counts(&self) -> Counts {
        *self.counts.borrow()
    }

    /// Waits until the counts are as they should be, for 30 s at most.
    ///
    /// `proxy.until(|counts| counts.withheld > 0).await`: the server has answered, and nobody knows.
    pub async fn until(&self, wanted: impl FnMut(&Counts) -> bool) {
        let mut counts = self.counts.clone();
        let waited = tokio::time::timeout(Duration::from_secs(30), counts.wait_for(wanted)).await;
        assert!(waited.is_ok(), "waited 30 s in vain, the proxy's counts are {:?}", self.counts());
    }
}

#[derive(Debug)]
struct Control {
    fault: Fault,
    /// Counts how often the fault was set.
    setting: u64,
    /// Counts how often connections were cut.
    cuts: u64,
}

#[derive(Clone)]
struct Network {
    target: SocketAddr,
    control: watch::Receiver<Control>,
    counts: Arc<watch::Sender<Counts>>,
}

impl Network {
    /// Ends when the [`Proxy`] is dropped; the runtime and all connections end with it.
    async fn serve(mut self, send_address: &mpsc::Sender<SocketAddr>) {
        let mut address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        loop {
            let socket = bind(address);
            address = socket.local_addr().expect("a bound socket has an address");
            // While it is bound and does not listen, connections are refused, and nobody else gets the port.
            if self.control.wait_for(|control| control.fault != Fault::Refuse).await.is_err() {
                return;
            }
            let listener = socket.listen(1024).expect("a bound socket can listen");
            let _ = send_address.send(address);
            if !self.accept_until_refused(&listener).await {
                return;
            }
        }
    }

    /// Returns whether the proxy is still there.
    async fn accept_until_refused(&self, listener: &TcpListener) -> bool {
        let mut control = self.control.clone();
        loop {
            tokio::select! {
                biased;
                refused = control.wait_for(|control| control.fault == Fault::Refuse) => return refused.is_ok(),
                accepted = listener.accept() => {
                    if let Ok((client, _)) = accepted {
                        self.counts.send_modify(|counts| counts.accepted += 1);
                        tokio::spawn(self.clone().connect(client));
                    }
                }
            }
        }
    }

    async fn connect(mut self, mut client: TcpStream) {
        let cuts = self.control.borrow().cuts;
        let Ok(mut server) = TcpStream::connect(self.target).await else { return };
        let _open = Counted::new(&self.counts, |counts| &mut counts.open);
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let passed = {
            let seen_in = AtomicU64::new(0);
            let (from_client, to_client) = client.split();
            let (from_server, to_server) = server.split();
            let requests = Direction::new(&self, cuts, &seen_in).pass_requests(from_client, to_server);
            let replies = Direction::new(&self, cuts, &seen_in).pass_replies(from_server, to_client);
            tokio::select! {
                passed = async { tokio::try_join!(requests, replies) } => passed.is_ok(),
                _ = self.control.wait_for(|control| control.cuts != cuts) => false,
            }
        };
        if !passed {
            let _ = (client.set_zero_linger(), server.set_zero_linger());
        }
    }
}

/// One direction of a connection.
struct Direction<'a> {
    control: watch::Receiver<Control>,
    counts: Arc<watch::Sender<Counts>>,
    /// How often connections had been cut when this one was opened.
    cuts: u64,
    /// The setting in which the bytes to hold replies from were seen.
    seen_in: &'a AtomicU64,
    /// The setting in which the bytes below were passed on.
    setting: u64,
    passed: usize,
    lost: Option<Counted>,
}

impl<'a> Direction<'a> {
    fn new(network: &Network, cuts: u64, seen_in: &'a AtomicU64) -> Self {
        let counts = Arc::clone(&network.counts);
        Self { control: network.control.clone(), counts, cuts, seen_in, setting: 0, passed: 0, lost: None }
    }

    async fn pass_requests(mut self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let read = from.read(&mut buffer).await?;
            if read == 0 {
                return to.shutdown().await;
            }
            let (fault, setting) = self.fault();
            let mut passed = read;
            if let Fault::LoseRequestsAfter(limit) = fault {
                passed = self.pass_within(limit, read);
            } else if let Fault::HoldRepliesFrom(wanted) = fault
                && contains(&buffer[..read], wanted)
            {
                self.seen_in.store(setting, Ordering::SeqCst);
            } else if let Fault::HoldRequestsFrom(wanted) = fault
                && contains(&buffer[..read], wanted)
            {
                self.hold_while(|control| control.setting == setting).await?;
            }
            to.write_all(&buffer[..passed]).await?;
        }
    }

    async fn pass_replies(mut self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let read = from.read(&mut buffer).await?;
            self.hold().await?;
            if read == 0 {
                return to.shutdown().await;
            }
            let mut passed = read;
            let (fault, _) = self.fault();
            if let Fault::LoseRepliesAfter(limit) = fault {
                passed = self.pass_within(limit, read);
            } else if let Fault::DelayReplies(delay) = fault {
                tokio::time::sleep(delay).await;
            }
            to.write_all(&buffer[..passed]).await?;
        }
    }

    async fn hold(&mut self) -> io::Result<()> {
        let seen_in = self.seen_in.load(Ordering::SeqCst);
        let holds = |control: &Control| {
            control.fault == Fault::HoldReplies
                || matches!(control.fault, Fault::HoldRepliesFrom(_)) && control.setting == seen_in
        };
        if holds(&self.control.borrow()) {
            self.hold_while(holds).await?;
        }
        Ok(())
    }

    /// Fails if the connection was cut meanwhile, whatever else has changed since.
    async fn hold_while(&mut self, holds: impl Fn(&Control) -> bool) -> io::Result<()> {
        let _held = Counted::new(&self.counts, |counts| &mut counts.withheld);
        let cuts = self.cuts;
        match self.control.wait_for(|control| control.cuts != cuts || !holds(control)).await {
            Ok(control) if control.cuts != cuts => Err(io::ErrorKind::ConnectionReset.into()),
            _ => Ok(()),
        }
    }

    fn fault(&mut self) -> (Fault, u64) {
        let control = self.control.borrow();
        if control.setting != self.setting {
            (self.setting, self.passed, self.lost) = (control.setting, 0, None);
        }
        (control.fault.clone(), control.setting)
    }

    fn pass_within(&mut self, limit: usize, read: usize) -> usize {
        let passed = read.min(limit - self.passed);
        self.passed += passed;
        if passed < read && self.lost.is_none() {
            self.lost = Some(Counted::new(&self.counts, |counts| &mut counts.withheld));
        }
        passed
    }
}

/// Counts one as long as it lives.
struct Counted(Arc<watch::Sender<Counts>>, fn(&mut Counts) -> &mut usize);

impl Counted {
    fn new(counts: &Arc<watch::Sender<Counts>>, count: fn(&mut Counts) -> &mut usize) -> Self {
        counts.send_modify(|counts| *count(counts) += 1);
        Self(Arc::clone(counts), count)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|counts| *self.1(counts) -= 1);
    }
}

/// The port of a listener that was closed can be had again at once, in spite of its open connections.
fn bind(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket can be made");
    socket.set_reuseaddr(true).expect("a new socket can be configured");
    socket.bind(address).expect("the port is free, or was this proxy's a moment ago");
    socket
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

const CHUNK: usize = 64 * 1024;
