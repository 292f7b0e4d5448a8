//! `Fleet`, for workers and relays of this region.

use std::{sync::Arc, time::Duration};

use antiphon_core::id::{RelayNumber, WorkerNumber};
use antiphon_proto::v1::{
    AgentBehaviour, RelayDirective, RelayKeys, RelayMessage, RelayNeighbours, WorkerDirective, WorkerKeys,
    WorkerMessage, WorkerRelays, fleet_server, relay_directive, relay_message, worker_directive, worker_message,
};
use antiphon_runtime::{pki::Role, tls};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Pace, STREAM_QUEUE,
    peer::{Audience, ToldRoutes},
};
use crate::{
    admission::Admission,
    auth,
    fleet::{Fleet, Order, RelayHello, Standing, WorkerHello},
};

#[derive(Clone, Debug)]
pub(super) struct Service(pub(super) Arc<Admission>);

type Directives<T> = mpsc::Sender<Result<T, Status>>;

#[tonic::async_trait]
impl fleet_server::Fleet for Service {
    type RunWorkerStream = ReceiverStream<Result<WorkerDirective, Status>>;
    type RunRelayStream = ReceiverStream<Result<RelayDirective, Status>>;

    async fn run_worker(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::RunWorkerStream>, Status> {
        let fleet = Arc::clone(&self.0.fleet);
        let peer = auth::peer(&request, Role::Worker, Some(&fleet.region))?;
        let agents = tls::peer_agents_of(&request);
        let mut messages = request.into_inner();
        let Some(worker_message::Message::Hello(hello)) = first(&mut messages).await?.message else {
            return Err(Status::invalid_argument("the first message has to be hello"));
        };
        let hello = WorkerHello::check(&hello, &peer)?;
        hello.check_agent(&agents)?;
        let standing = fleet.register_worker(hello).await?;
        let (directives, stream) = mpsc::channel(STREAM_QUEUE);
        let worker = WorkerStream::new(fleet, standing, directives)?;
        let admission = Arc::clone(&self.0);
        self.0.tasks.spawn("worker channel", async move {
            admission.warm(standing.number).await;
            Ok(())
        });
        let stopping = self.0.tasks.stopping();
        self.0.tasks.spawn("worker stream", async move {
            stopping.run_until_cancelled(worker.run(messages)).await;
            Ok(())
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn run_relay(
        &self,
        request: Request<Streaming<RelayMessage>>,
    ) -> Result<Response<Self::RunRelayStream>, Status> {
        let fleet = Arc::clone(&self.0.fleet);
        let peer = auth::peer(&request, Role::Relay, Some(&fleet.region))?;
        let mut messages = request.into_inner();
        let Some(relay_message::Message::Hello(hello)) = first(&mut messages).await?.message else {
            return Err(Status::invalid_argument("the first message has to be hello"));
        };
        let hello = RelayHello::check(&hello, &peer)?;
        let standing = fleet.register_relay(hello).await?;
        let (directives, stream) = mpsc::channel(STREAM_QUEUE);
        let relay = RelayStream::new(fleet, standing, directives);
        let stopping = self.0.tasks.stopping();
        self.0.tasks.spawn("relay stream", async move {
            stopping.run_until_cancelled(relay.run(messages)).await;
            Ok(())
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

async fn first<T>(messages: &mut Streaming<T>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded("hello did not come in time");
    let message = timeout(HELLO_DEADLINE, messages.message()).await;
    message.map_err(late)??.ok_or_else(|| Status::invalid_argument("the stream ended before hello"))
}

/// One worker's registration.
struct WorkerStream {
    fleet: Arc<Fleet>,
    standing: Standing<WorkerNumber>,
    directives: Directives<WorkerDirective>,
    keys: WorkerKeys,
    behaviour: Option<AgentBehaviour>,
    orders: watch::Receiver<Option<Order>>,
}

/// However the stream ends, also by the router's own stop, the worker leaves placement.
impl Drop for WorkerStream {
    fn drop(&mut self) {
        self.fleet.worker_disconnected(self.standing);
    }
}

impl WorkerStream {
    fn new(
        fleet: Arc<Fleet>,
        standing: Standing<WorkerNumber>,
        directives: Directives<WorkerDirective>,
    ) -> Result<Self, Status> {
        let changed = || Status::aborted("the records changed: try again");
        let welcome = fleet.worker_welcome(standing.number).ok_or_else(changed)?;
        let orders = fleet.orders(standing.number).ok_or_else(changed)?;
        let (keys, behaviour) = (WorkerKeys::default(), None);
        let mut stream = Self { fleet, standing, directives, keys, behaviour, orders };
        stream.keys = WorkerKeys {
            cid_configs: welcome.cid_configs.clone(),
            ticket_keys: welcome.ticket_keys.clone(),
            relays: welcome.relays.clone(),
            reset_keys: welcome.reset_keys.clone(),
        };
        stream.behaviour.clone_from(&welcome.behaviour);
        stream.send(worker_directive::Directive::Welcome(welcome));
        Ok(stream)
    }

    async fn run(mut self, mut messages: Streaming<WorkerMessage>) {
        let mut topology = self.fleet.topology.subscribe();
        let mut pace = Pace::new();
        // What changed between the welcome and now.
        pace.mark();
        loop {
            let keep = tokio::select! {
                message = messages.message() => match message {
                    Ok(Some(message)) => self.take(message).await,
                    Ok(None) | Err(_) => false,
                },
                changed = topology.changed() => { pace.mark(); changed.is_ok() }
                () = pace.due() => { pace.sent(); self.tell() }
                ordered = self.orders.changed() => ordered.is_ok() && self.order(),
                () = self.directives.closed() => false,
            };
            if !keep {
                return;
            }
        }
    }

    /// Passes on the newest order, if there is one.
    fn order(&mut self) -> bool {
        let now = self.fleet.clock.now();
        let order = self.orders.borrow_and_update().as_ref().map(|order| order.directive(now));
        order.is_none_or(|order| self.send(worker_directive::Directive::Phase(order)))
    }

    /// `false`: the stream is over.
    async fn take(&self, message: WorkerMessage) -> bool {
        match message.message {
            Some(worker_message::Message::Report(report)) => self.fleet.worker_reported(self.standing, &report),
            Some(worker_message::Message::Deregister(_)) => {
                self.fleet.worker_deregistered(self.standing).await;
                false
            }
            Some(worker_message::Message::Hello(_)) => {
                let error = Status::invalid_argument("hello again: open another stream");
                let _ = self.directives.try_send(Err(error));
                false
            }
            // A message of a newer release.
            None => true,
        }
    }

    /// Sends what changed. `false`: the worker does not take it, or is not registered any more.
    fn tell(&mut self) -> bool {
        let Some(keys) = self.fleet.worker_keys(self.standing.number) else {
            return false;
        };
        if !self.fleet.worker_stands(self.standing) {
            return false;
        }
        let mut taken = true;
        let relays_alone = WorkerKeys { relays: self.keys.relays.clone(), ..keys.clone() } == self.keys;
        if keys != self.keys {
            self.keys.clone_from(&keys);
            taken &= self.send(if relays_alone {
                worker_directive::Directive::Relays(WorkerRelays { relays: keys.relays })
            } else {
                worker_directive::Directive::Keys(keys)
            });
        }
        let behaviour = self.fleet.worker_behaviour(self.standing.number);
        if let Some(behaviour) = behaviour.filter(|b| Some(b) != self.behaviour.as_ref()) {
            self.behaviour = Some(behaviour.clone());
            taken &= self.send(worker_directive::Directive::Behaviour(behaviour));
        }
        taken
    }

    fn send(&self, directive: worker_directive::Directive) -> bool {
        let directive = WorkerDirective { directive: Some(directive) };
        self.directives.try_send(Ok(directive)).is_ok()
    }
}

/// One relay's registration and its copy of the route table.
struct RelayStream {
    fleet: Arc<Fleet>,
    standing: Standing<RelayNumber>,
    directives: Directives<RelayDirective>,
    keys: RelayKeys,
    neighbours: RelayNeighbours,
    routes: ToldRoutes,
}

impl Drop for RelayStream {
    fn drop(&mut self) {
        self.fleet.relay_disconnected(self.standing);
    }
}

impl RelayStream {
    fn new(fleet: Arc<Fleet>, standing: Standing<RelayNumber>, directives: Directives<RelayDirective>) -> Self {
        let welcome = fleet.relay_welcome(standing.number);
        let keys = RelayKeys { cid_configs: welcome.cid_configs.clone(), secrets: welcome.secrets.clone() };
        let mut stream = Self {
            fleet,
            standing,
            directives,
            keys,
            neighbours: RelayNeighbours::default(),
            routes: ToldRoutes::default(),
        };
        stream.send(relay_directive::Directive::Welcome(welcome));
        stream.tell();
        stream
    }

    async fn run(mut self, mut messages: Streaming<RelayMessage>) {
        let mut topology = self.fleet.topology.subscribe();
        let mut pace = Pace::new();
        pace.mark();
        loop {
            let keep = tokio::select! {
                message = messages.message() => match message {
                    Ok(Some(message)) => self.take(message).await,
                    Ok(None) | Err(_) => false,
                },
                changed = topology.changed() => { pace.mark(); changed.is_ok() }
                () = pace.due() => { pace.sent(); self.tell() }
                () = self.directives.closed() => false,
            };
            if !keep {
                return;
            }
        }
    }

    async fn take(&self, message: RelayMessage) -> bool {
        match message.message {
            Some(relay_message::Message::Report(report)) => self.fleet.relay_reported(self.standing, &report),
            Some(relay_message::Message::Deregister(_)) => {
                self.fleet.relay_deregistered(self.standing).await;
                false
            }
            Some(relay_message::Message::Hello(_)) => {
                let error = Status::invalid_argument("hello again: open another stream");
                let _ = self.directives.try_send(Err(error));
                false
            }
            None => true,
        }
    }

    fn tell(&mut self) -> bool {
        let mut taken = true;
        let keys = self.fleet.relay_keys(self.standing.number);
        if keys != self.keys {
            self.keys.clone_from(&keys);
            taken &= self.send(relay_directive::Directive::Keys(keys));
        }
        let neighbours = self.fleet.neighbours(self.standing.number);
        if neighbours != self.neighbours {
            self.neighbours.clone_from(&neighbours);
            taken &= self.send(relay_directive::Directive::Neighbours(neighbours));
        }
        let update = self.routes.update(&self.fleet, Audience::Relay);
        taken && update.is_none_or(|update| self.send(relay_directive::Directive::Routes(update)))
    }

    fn send(&self, directive: relay_directive::Directive) -> bool {
        let directive = RelayDirective { directive: Some(directive) };
        self.directives.try_send(Ok(directive)).is_ok()
    }
}

const HELLO_DEADLINE: Duration = Duration::from_secs(5);
