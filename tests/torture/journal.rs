//! What handlers tell of themselves to the harness, which survives them.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Router,
    extract::{Path, State},
    routing::post,
};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::net::TcpListener;

/// Counts for each key what was done. Clones share everything.
#[derive(Clone, Debug)]
pub struct Journal {
    address: SocketAddr,
    counts: Counts,
}

/// By key and deed.
type Counts = Arc<Mutex<HashMap<(String, String), usize>>>;

impl Journal {
    pub async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
        let address = listener.local_addr().expect("a listener has an address");
        let counts = Counts::default();
        let app = Router::new().route("/{key}/{deed}", post(note)).with_state(Arc::clone(&counts));
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, counts }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How often this was done for the key.
    pub fn count(&self, key: &str, deed: &str) -> usize {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.get(&(key.to_owned(), deed.to_owned())).copied().unwrap_or_default()
    }
}

async fn note(State(counts): State<Counts>, Path(done): Path<(String, String)>) {
    *counts.lock().unwrap_or_else(PoisonError::into_inner).entry(done).or_default() += 1;
}

/// Writes into the journal of another process.
#[derive(Clone, Debug)]
pub struct Reporter {
    http: Client<HttpConnector, Full<Bytes>>,
    address: SocketAddr,
}

impl Reporter {
    /// For the journal that the environment names.
    pub fn from_env() -> Option<Self> {
        let address = std::env::var(JOURNAL).ok()?;
        let http = Client::builder(TokioExecutor::new()).build_http();
        Some(Self { http, address: address.parse().expect("the journal is named by its address") })
    }

    /// Returns when it is written down.
    pub async fn tell(&self, key: &str, deed: &str) {
        let request = Request::post(format!("http://{}/{key}/{deed}", self.address)).body(Full::default());
        let told = self.http.request(request.expect("a key is fit for a path")).await;
        assert_eq!(told.expect("the journal answers").status(), StatusCode::OK);
    }
}

pub const JOURNAL: &str = "JOURNAL";
