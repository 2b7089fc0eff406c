//! Requests and responses on real sockets, byte for byte.

mod framing;
mod refused_bodies;
mod replays;
mod requests;
mod streams;
