# ItemCache alone: it reaches PostgreSQL and Redis over the network. docs/docker.md says how to run it.

FROM node:26-bookworm-slim AS packages
WORKDIR /app
COPY package.json package-lock.json ./
COPY clients/typescript/package.json clients/typescript/
# The optional packages are a private PostgreSQL and a Node of its own: the image needs neither.
RUN npm ci --omit=dev --omit=optional --ignore-scripts --no-audit --no-fund

FROM node:26-bookworm-slim
LABEL org.opencontainers.image.title="ItemCache" \
      org.opencontainers.image.description="A gRPC item cache over four tiers: memory, Redis, PostgreSQL and an external catalogue" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /app
COPY --from=packages /app/node_modules node_modules
COPY package.json LICENSE ./
COPY clients/typescript clients/typescript
COPY src src

# What memory holds is on huge pages where the system has them: docs/performance.md.
ENV GLIBC_TUNABLES=glibc.malloc.hugetlb=1
# Addresses that other containers reach need ITEMCACHE_INSECURE=true: whoever runs the image says so, not the image.
ENV NODE_ENV=production \
    ITEMCACHE_LISTEN=0.0.0.0:50051 \
    ITEMCACHE_ADMIN_LISTEN=0.0.0.0:9464 \
    REDIS_URL=off
EXPOSE 50051 9464
# The user "node" by number, so that an orchestrator sees that it is not root. It owns no file here and writes none.
USER 1000:1000
# The start period leaves time for a PostgreSQL that is still starting.
HEALTHCHECK --interval=5s --timeout=3s --start-period=40s --retries=3 \
  CMD ["node", "-e", "fetch('http://127.0.0.1:9464/healthz').then(({ ok }) => process.exit(ok ? 0 : 1), () => process.exit(1))"]
# The first arguments bound the pauses of the garbage collector: docs/performance.md.
CMD ["node", "--max-semi-space-size=4", "--v8-pool-size=1", "--no-allocation-site-pretenuring", "src/main.ts"]
