//! Lines that take their time: what enters comes out a constant delay later.

use std::{
    collections::VecDeque,
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use antiphon_runtime::Tasks;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream, UdpSocket,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    time::{Instant, sleep_until},
};

/// The address that leads to the TCP server `to`.
pub(crate) async fn tcp(to: SocketAddr, delay: Duration, tasks: &Tasks) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let owner = tasks.clone();
    tasks.spawn("delayed tcp", async move {
        let stopping = owner.stopping();
        while let Some(accepted) = stopping.run_until_cancelled(listener.accept()).await {
            let (near, far) = (accepted?.0, TcpStream::connect(to).await?);
            near.set_nodelay(true)?;
            far.set_nodelay(true)?;
            let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
            let stopping = stopping.clone();
            owner.spawn("delayed bytes", async move {
                let both = async { tokio::join!(carry(near_in, far_out, delay), carry(far_in, near_out, delay)) };
                // How a connection ended is its ends' business.
                let _ended = stopping.run_until_cancelled(both).await;
                Ok(())
            });
        }
        Ok(())
    });
    Ok(address)
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, delay: Duration) -> io::Result<()> {
    let (enter, mut leave) = mpsc::channel::<(Instant, Vec<u8>)>(1_024);
    let entering = async move {
        loop {
            let mut bytes = vec![0; 16_384];
            let length = from.read(&mut bytes).await?;
            bytes.truncate(length);
            if length == 0 || enter.send((Instant::now() + delay, bytes)).await.is_err() {
                return Ok::<_, io::Error>(());
            }
        }
    };
    let leaving = async {
        while let Some((due, bytes)) = leave.recv().await {
            sleep_until(due).await;
            to.write_all(&bytes).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(entering, leaving).map(|_| ())
}

/// The address that leads to the UDP port `to`, for one caller.
pub(crate) async fn udp(to: SocketAddr, delay: Duration, tasks: &Tasks) -> io::Result<SocketAddr> {
    let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    far.connect(to).await?;
    let address = near.local_addr()?;
    let stopping = tasks.stopping();
    tasks.spawn("delayed udp", async move {
        let (mut up, mut down) = (vec![0; 2_048], vec![0; 2_048]);
        let mut caller = None;
        // Equal delays: what entered first leaves first.
        let mut under_way = VecDeque::new();
        loop {
            let due = under_way.front().map_or_else(Instant::now, |(due, _, _)| *due);
            tokio::select! {
                received = near.recv_from(&mut up) => {
                    let (length, from) = received?;
                    caller = Some(from);
                    under_way.push_back((Instant::now() + delay, true, up[..length].to_vec()));
                }
                received = far.recv(&mut down) => {
                    under_way.push_back((Instant::now() + delay, false, down[..received?].to_vec()));
                }
                () = sleep_until(due), if !under_way.is_empty() => match (under_way.pop_front(), caller) {
                    (Some((_, true, bytes)), _) => drop(far.send(&bytes).await),
                    (Some((_, false, bytes)), Some(caller)) => drop(near.send_to(&bytes, caller).await),
                    _ => {}
                },
                () = stopping.cancelled() => return Ok(()),
            }
        }
    });
    Ok(address)
}
