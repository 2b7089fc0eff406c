//! Settings of requests.

use std::{sync::Arc, time::Duration};

use http::{HeaderName, Method};
use tokio::sync::Semaphore;

use crate::{
    consumer::ConsumerExtractor, duration::limit, fingerprint::Fingerprinter, key::KeySyntax,
    layer::IdempotencyLayer,
};

/// Requests: which are guarded, whose they are, and how many and how large they may be.
impl IdempotencyLayer {
    /// Sets the guarded methods. All others pass through, and their key header is ignored. Default:
    /// `POST` and `PATCH`.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use http::Method;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_methods([Method::POST, Method::PUT]);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If one of them is safe or never has a key: `GET`, `HEAD`, `OPTIONS`, `TRACE`, `CONNECT`.
    #[must_use]
    #[track_caller]
    pub fn with_methods(self, methods: impl IntoIterator<Item = Method>) -> Self {
        let methods: Vec<Method> = methods.into_iter().collect();
        let never = [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::CONNECT];
        if let Some(method) = methods.iter().find(|method| never.contains(method)) {
            panic!(
                "{method} cannot be guarded: it changes nothing, so it is safe to retry; remove it from the \
                 methods"
            );
        }
        self.set(|settings| settings.methods = methods)
    }

    /// Sets the header that carries the key. Default: `Idempotency-Key`.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use http::HeaderName;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let name = HeaderName::from_static("x-request-token");
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_key_header(name);
    /// # }
    /// ```
    #[must_use]
    pub fn with_key_header(self, name: HeaderName) -> Self {
        self.set(|settings| settings.key_header = name)
    }

    /// Sets the accepted keys. Default: [`KeySyntax::default`], 1 to 255 bytes.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, KeySyntax, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_key_syntax(KeySyntax::uuid());
    /// # }
    /// ```
    #[must_use]
    pub fn with_key_syntax(self, syntax: KeySyntax) -> Self {
        self.set(|settings| settings.key_syntax = syntax)
    }

    /// Refuses guarded requests without a key: 400 `key-missing`. Default: they pass through,
    /// unprotected.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).required();
    /// # }
    /// ```
    #[must_use]
    pub fn required(self) -> Self {
        self.set(|settings| settings.required = true)
    }

    /// Derives a key from the fingerprint of a request that has none, for clients that cannot send
    /// one. Off by default.
    ///
    /// An equal request of the same consumer within `window` of the first counts as its retry,
    /// **also if it is meant as a second one**: two equal orders of the same article cannot be told
    /// apart. The window is the retention of such records, and begins with the first request.
    ///
    /// With it, [`required`](Self::required) has no effect. With [`Fingerprinter::none`] all
    /// requests to an endpoint are equal.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_derived_key(Duration::from_secs(60));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If `window` is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_derived_key(self, window: Duration) -> Self {
        let window = limit("a window for derived keys", window);
        self.set(|settings| settings.derived_key = Some(window))
    }

    /// Sets the extractor that finds the consumer of a request. Default:
    /// [`ConsumerExtractor::default`], which refuses to guess.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{ConsumerExtractor, IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_consumer(ConsumerExtractor::extension());
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// When the layer is used, if the header that it reads would be
    /// [kept](Self::with_kept_requests).
    #[must_use]
    pub fn with_consumer(self, extractor: ConsumerExtractor) -> Self {
        self.set(|settings| settings.consumer = extractor)
    }

    /// Sets the fingerprint, which tells a retry from another request. Default:
    /// [`Fingerprinter::default`], over method, path, query, content type and body.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use http::HeaderName;
    /// # use tower_idempotency::{Fingerprinter, IdempotencyLayer, MemoryStore};
    /// let fingerprinter = Fingerprinter::default()
    ///     .add_header(HeaderName::from_static("x-tenant"));
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_fingerprint(fingerprinter);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// When the layer is used, if it covers a header that cannot be kept, and requests are
    /// [kept](Self::with_kept_requests).
    #[must_use]
    pub fn with_fingerprint(self, fingerprinter: Fingerprinter) -> Self {
        self.set(|settings| settings.fingerprinter = fingerprinter)
    }

    /// Limits how many handlers of requests with a key run simultaneously. A request for which
    /// there is no place gets 503 `overloaded`, and its key is not taken. Clones made afterwards
    /// share the limit. Default: 1,024.
    ///
    /// A handler goes on when its client disconnects, so a client could start any number of them
    /// with streams of HTTP/2 that it resets. This limit is the bound. It counts handlers only:
    /// replays and refusals need no place. A place is taken from the claim until the handler has
    /// returned, also while it waits for a connection of the database pool or for a limit inside
    /// this layer.
    ///
    /// The default suits handlers that mostly wait. It is far above what a pool of connections
    /// serves (10 to 100), so that a burst queues there instead of being refused, and low enough
    /// for the memory of a small server: request bodies have a
    /// [limit](Self::with_request_buffer_limit) of their own, so that a place costs what its
    /// handler itself holds. Set it lower if handlers hold much memory, and higher if more of them
    /// wait for slow services. `usize::MAX` is no limit.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_max_in_flight(1000);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_max_in_flight(self, limit: usize) -> Self {
        assert!(limit > 0, "no request in flight: every request with a key would be refused; use at least 1");
        let places = Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS)));
        self.set(|settings| settings.in_flight = places)
    }

    /// Limits the body of a request with a key, in bytes, to at most 4 GiB; a larger one gets 413.
    /// Default: 1 MiB.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_request_body_limit(64 * 1024);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// When the layer is used, if it is over the limit of all bodies together.
    #[must_use]
    pub fn with_request_body_limit(self, bytes: usize) -> Self {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.set(|settings| settings.request_limits.body_limit = bytes)
    }

    /// Limits all buffered request bodies together, in bytes; a body that does not fit gets 503
    /// `overloaded`. Clones made afterwards share the limit. Default: 64 MiB.
    ///
    /// Room is taken for what was received, not for what a client announces, and while the handler
    /// has the body. A client that sends a part and pauses holds the room of that part for at most
    /// the [time-out](Self::with_request_body_timeout).
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_request_buffer_limit(256 * 1024 * 1024);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// When the layer is used, if it is below the limit of one body.
    #[must_use]
    pub fn with_request_buffer_limit(self, bytes: usize) -> Self {
        let free = Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)));
        self.set(|settings| {
            settings.request_limits.total_limit = bytes;
            settings.request_limits.free = free;
        })
    }

    /// Limits how long the body of a request may take to arrive; a slower one gets 408. Default: 30
    /// s.
    ///
    /// The rest of a body that is refused is read and thrown away for at most as long, so that the
    /// refusal arrives over HTTP/1.1 and the connection can be used again.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let limit = Duration::from_secs(10);
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_request_body_timeout(limit);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_request_body_timeout(self, timeout: Duration) -> Self {
        let timeout = limit("a time-out for request bodies", timeout);
        self.set(|settings| settings.request_limits.timeout = timeout)
    }
}
