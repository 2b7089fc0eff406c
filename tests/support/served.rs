//! Applications in this process, behind real sockets.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{Router, response::Response, routing::any};
use bytes::Bytes;
use tokio::net::TcpListener;
use tower_idempotency::{
    IdempotencyHandle, IdempotencyLayer, MemoryStore,
    store::{Record, RecordFilter},
};

use super::http::{RawResponse, exchange, post};

/// Counts how often something happened.
#[derive(Clone, Debug, Default)]
pub struct Count(Arc<AtomicUsize>);

impl Count {
    /// Once more. Returns how often it is with this time.
    pub fn add(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// How often it happened.
    pub fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// An application with one path, `/charges`, for every method, behind the layer.
#[derive(Debug)]
pub struct App {
    /// Where it listens.
    pub address: SocketAddr,
    /// How often the handler ran.
    pub runs: Count,
    handle: IdempotencyHandle,
}

impl App {
    /// Serves an application whose handler gets the number of the run and the request's body.
    pub async fn start<A>(layer: IdempotencyLayer, answer: A) -> Self
    where
        A: Fn(usize, Bytes) -> Response + Clone + Send + Sync + 'static,
    {
        let runs = Count::default();
        let counter = runs.clone();
        let handler = move |body: Bytes| async move { answer(counter.add(), body) };
        let handle = layer.handle();
        let router = Router::new().route("/charges", any(handler)).layer(layer);
        Self { address: serve(router).await, runs, handle }
    }

    /// Sends a request with this key on a connection of its own.
    pub async fn post(&self, key: &str) -> RawResponse {
        exchange(self.address, post(key, &[], "2000")).await
    }

    /// What is stored.
    pub async fn records(&self) -> Vec<Record> {
        self.handle.list(RecordFilter::All, 100).await.expect("the memory store answers")
    }
}

/// A layer over a memory store of its own.
pub fn layer() -> IdempotencyLayer {
    IdempotencyLayer::new(MemoryStore::new())
}

/// Serves an application for HTTP/1.1 and HTTP/2, as long as the test runs.
pub async fn serve(app: Router) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
    let address = listener.local_addr().expect("a listener has an address");
    tokio::spawn(async { axum::serve(listener, app).await });
    address
}
