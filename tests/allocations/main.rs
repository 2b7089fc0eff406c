//! Allocations of one request, around a plain tower service. They are counted per thread, and the runtime has one.

use std::convert::Infallible;

use allocation_counter::measure;
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Full;
use tower::{Layer, Service, service_fn};
use tower_idempotency::{IdempotencyLayer, MemoryStore, Reaper, layer::RequestBody};

type Body = Full<Bytes>;

async fn handle(_: Request<RequestBody<Body>>) -> Result<Response<Body>, Infallible> {
    Ok(Response::new(Body::new(Bytes::from_static(b"done"))))
}

fn request(method: Method, key: Option<&str>) -> Request<Body> {
    let mut request = Request::new(Body::new(Bytes::from_static(b"2000")));
    *request.method_mut() = method;
    if let Some(key) = key {
        request.headers_mut().insert("idempotency-key", key.parse().unwrap());
    }
    request
}

/// The allocations of each of these requests, once the layer has been used.
fn allocations(layer: &IdempotencyLayer, requests: impl IntoIterator<Item = Request<Body>>) -> Vec<u64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut service = layer.layer(service_fn(handle));
    let mut send = |request| {
        runtime.block_on(async {
            let response = service.call(request).await.unwrap();
            assert!(response.status().is_success(), "{response:?}");
            response
        })
    };
    for key in 0..100 {
        send(request(Method::POST, Some(&format!("warm-{key}"))));
    }
    requests.into_iter().map(|request| measure(|| drop(send(request))).count_total).collect()
}

fn layer() -> IdempotencyLayer {
    IdempotencyLayer::new(MemoryStore::new()).with_reaper(Reaper::off())
}

#[test]
fn a_request_that_is_not_guarded_costs_none() {
    let requests = [request(Method::POST, None), request(Method::PATCH, None), request(Method::GET, None)];
    for allocated in allocations(&layer(), requests) {
        assert_eq!(allocated, 0);
    }
}

#[test]
fn a_request_with_a_key_costs_few() {
    let requests = (0..4).map(|_| request(Method::POST, Some("key")));
    let counts = allocations(&layer(), requests);
    let [first, from_the_store, from_the_cache, again] = counts[..] else { panic!("{counts:?}") };
    assert!(first <= 45 && from_the_store <= 28 && from_the_cache <= 22, "{counts:?}");
    assert_eq!(from_the_cache, again);
}
