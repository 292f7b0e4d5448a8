# Antiphon's images, one target for each: static programs FROM scratch, for nobody.
#
#   docker build --target router --tag antiphon/router:0.1.0 .
#
# `cargo xtask cluster images` makes the same images without Docker.
FROM rust:1.95-alpine AS build
# Parts of the cryptography are C; the descriptors that generated code comes from are read by tools/protoc.
RUN apk add --no-cache musl-dev gcc
WORKDIR /antiphon
COPY . .
RUN cargo build --locked --profile image --bins \
    --package antiphon-operator --package antiphon-router --package antiphon-relay \
    --package antiphon-worker --package antiphon-cli \
    && mkdir /programs \
    && for program in antiphon-operator antiphon-router antiphon-relay antiphon-worker antiphon; do \
        cp "target/image/$program" /programs/ || exit; \
    done

FROM scratch AS none
LABEL org.opencontainers.image.licenses="Apache-2.0"
USER 65532:65532

FROM none AS operator
COPY --from=build /programs/antiphon-operator /antiphon-operator
ENTRYPOINT ["/antiphon-operator"]

FROM none AS router
COPY --from=build /programs/antiphon-router /antiphon-router
ENTRYPOINT ["/antiphon-router"]

FROM none AS relay
COPY --from=build /programs/antiphon-relay /antiphon-relay
ENTRYPOINT ["/antiphon-relay"]

FROM none AS worker
COPY --from=build /programs/antiphon-worker /antiphon-worker
ENTRYPOINT ["/antiphon-worker"]

FROM none AS cli
COPY --from=build /programs/antiphon /antiphon
ENTRYPOINT ["/antiphon"]
