/* The server of the benches: fast enough that the client is what is measured, and it writes down its own times.
 *
 *   GET|POST /short                 one JSON reply of 300 bytes
 *   POST /stream/<chunks>/<us>      <chunks> server-sent events, one each <us> microseconds (at least 1)
 *   POST /v1/chat/completions       as /short, and with ?chunks=<chunks>&us=<us> as /stream
 *
 * Every event carries "rx", the kernel's receive stamp of the request, and "tx", the clock just before its own write,
 * both in CLOCK_MONOTONIC nanoseconds. Single thread, epoll, one FIFO of due times (one period at a time keeps it sorted).
 * It polls its core without ever sleeping: were it to sleep, each client would pay for waking it, a faster one less often.
 * With the argument "sleep" it sleeps while it has nothing to do, so that a load generator can share its core.
 * GET /busy tells how many nanoseconds of work it has done, from which its ceiling follows. Prints its port, serves until
 * it is killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FD = 65536, READ_BYTES = 65536, EVENTS = 1024, BURST = 64 };

struct conn {
    long need;          /* body bytes of the request still to come */
    long chunks_left;   /* events still to send */
    long period_ns;
    long due_ns;        /* planned time of the next event */
    long rx_ns;
    int head_len;
    char head[4096];    /* an incomplete request head */
};

static struct conn *conns[MAX_FD];
static int queue[MAX_FD], queue_head, queue_len; /* streams in order of their due time */
static int epoll_fd;
static long offset_ns; /* realtime minus monotonic */
static long busy_ns;
static char short_reply[1024];
static int short_len;

static const char STREAM_HEAD[] = "HTTP/1.1 200 OK\r\nServer: mock\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                                  "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n";
static const char EVENT[] = "data: {\"id\":\"chatcmpl-6f1f2ab0c8f04b6d\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,"
                            "\"model\":\"mock\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},\"logprobs\":null,"
                            "\"finish_reason\":null}],\"rx\":%ld,\"tx\":%ld}\n\n";
static const char STREAM_END[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

static long clock_ns(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void fatal(const char *what) {
    perror(what);
    exit(1);
}

static void drop(int fd) {
    struct conn *c = conns[fd];
    if (c->chunks_left) { /* leave its place in the queue empty */
        for (int i = 0; i < queue_len; i++)
            if (queue[(queue_head + i) % MAX_FD] == fd) queue[(queue_head + i) % MAX_FD] = -1;
    }
    free(c);
    conns[fd] = NULL;
    close(fd);
}

/* True where all of it was written; a mock's reader that is too slow loses its connection. */
static int put(int fd, const char *data, int len) {
    if (send(fd, data, len, MSG_NOSIGNAL | MSG_DONTWAIT) == len) return 1;
    drop(fd);
    return 0;
}

static int add_event(struct conn *c, char *at) {
    char event[512];
    int len = snprintf(event, sizeof event, EVENT, c->rx_ns, clock_ns(CLOCK_MONOTONIC));
    int n = sprintf(at, "%x\r\n", len);
    memcpy(at + n, event, len);
    memcpy(at + n + len, "\r\n", 2);
    n += len + 2;
    if (--c->chunks_left == 0) {
        memcpy(at + n, STREAM_END, sizeof STREAM_END - 1);
        n += sizeof STREAM_END - 1;
    }
    return n;
}

static void enqueue(int fd) {
    queue[(queue_head + queue_len++) % MAX_FD] = fd;
}

static int send_due(void) {
    char out[1024];
    long now = clock_ns(CLOCK_MONOTONIC);
    int sent = 0;
    for (int n = 0; n < BURST && queue_len; n++) { /* bounded, so that requests are read in between */
        int fd = queue[queue_head];
        if (fd >= 0 && conns[fd]->due_ns > now) break;
        queue_head = (queue_head + 1) % MAX_FD, queue_len--;
        if (fd < 0) continue;
        struct conn *c = conns[fd];
        c->due_ns += c->period_ns;
        int len = add_event(c, out);
        int more = c->chunks_left > 0;
        if (put(fd, out, len) && more) enqueue(fd);
        sent++;
    }
    return sent;
}

static void answer(int fd, const char *head) {
    struct conn *c = conns[fd];
    const char *path = strchr(head, ' ');
    if (path && (sscanf(path, " /stream/%ld/%ld", &c->chunks_left, &c->period_ns) == 2 ||
                 sscanf(path, " /v1/chat/completions?chunks=%ld&us=%ld", &c->chunks_left, &c->period_ns) == 2)) {
        c->period_ns *= 1000;
        c->due_ns = clock_ns(CLOCK_MONOTONIC) + c->period_ns;
        if (!put(fd, STREAM_HEAD, sizeof STREAM_HEAD - 1)) return;
        enqueue(fd);
        return;
    }
    if (path && strncmp(path, " /busy ", 7) == 0) {
        char body[32], reply[128];
        int len = sprintf(body, "%ld", busy_ns);
        put(fd, reply, sprintf(reply, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len, body));
        return;
    }
    put(fd, short_reply, short_len);
}

static void on_request_bytes(int fd, char *data, int len) {
    struct conn *c = conns[fd];
    if (c->need) { /* the rest of a body */
        c->need -= len;
        if (c->need <= 0) c->need = 0, answer(fd, c->head);
        return;
    }
    if (c->head_len + len >= (int)sizeof c->head - 1) len = sizeof c->head - 1 - c->head_len;
    memcpy(c->head + c->head_len, data, len);
    c->head[c->head_len += len] = 0;
    char *end = strstr(c->head, "\r\n\r\n");
    if (!end) return;
    char *length = strcasestr(c->head, "content-length:");
    long body = length && length < end ? atol(length + 15) : 0;
    c->need = body - (c->head_len - (end + 4 - c->head));
    c->head_len = 0;
    if (c->need <= 0) c->need = 0, answer(fd, c->head);
}

static void on_readable(int fd) {
    static char data[READ_BYTES];
    char control[64];
    struct iovec part = {data, sizeof data};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t len = recvmsg(fd, &message, MSG_DONTWAIT);
    if (len < 0 && errno == EAGAIN) return;
    if (len <= 0) {
        drop(fd);
        return;
    }
    for (struct cmsghdr *m = CMSG_FIRSTHDR(&message); m; m = CMSG_NXTHDR(&message, m)) {
        struct timespec stamp;
        memcpy(&stamp, CMSG_DATA(m), sizeof stamp);
        conns[fd]->rx_ns = stamp.tv_sec * 1000000000L + stamp.tv_nsec - offset_ns;
    }
    on_request_bytes(fd, data, len);
}

static void on_connection(int listener) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), one = 1;
    if (fd < 0) return;
    if (fd >= MAX_FD) fatal("too many connections");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one);
    conns[fd] = calloc(1, sizeof *conns[fd]);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
}

static int listen_on_a_free_port(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int one = 1;
    setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one); /* the kernel goes on stamping while all are closed */
    if (bind(fd, (struct sockaddr *)&address, size) || listen(fd, 4096)) fatal("listen");
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static void prepare(void) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    long before = clock_ns(CLOCK_MONOTONIC);
    offset_ns = clock_ns(CLOCK_REALTIME) - (before + clock_ns(CLOCK_MONOTONIC)) / 2;
    char body[400];
    int len = snprintf(body, sizeof body, "{\"id\":\"cmpl-1\",\"object\":\"chat.completion\",\"model\":\"mock\",\"choices\":[{\"index\":0,"
                       "\"message\":{\"role\":\"assistant\",\"content\":\"%060d\"},\"finish_reason\":\"stop\"}],"
                       "\"usage\":{\"prompt_tokens\":16,\"completion_tokens\":16,\"total_tokens\":32}}", 0);
    short_len = snprintf(short_reply, sizeof short_reply, "HTTP/1.1 200 OK\r\nServer: mock\r\nContent-Type: application/json\r\n"
                         "Content-Length: %d\r\n\r\n%s", len, body);
}

/* Until there is something to do, or, where it must not sleep, at once. */
static int wait_for(struct epoll_event *events, int sleeps) {
    struct timespec left = {0, 0};
    int due = queue_len ? queue[queue_head] : 0;
    if (sleeps && queue_len && due >= 0) {
        long ns = conns[due]->due_ns - clock_ns(CLOCK_MONOTONIC);
        if (ns > 0) left = (struct timespec){ns / 1000000000L, ns % 1000000000L};
    }
    return epoll_pwait2(epoll_fd, events, EVENTS, sleeps && !queue_len ? NULL : &left, NULL);
}

int main(int argc, char **argv) {
    int sleeps = argc > 1 && strcmp(argv[1], "sleep") == 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0); /* it never outlives the bench */
    prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
    prepare();
    epoll_fd = epoll_create1(0);
    int listener = listen_on_a_free_port();
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
    static struct epoll_event events[EVENTS];
    for (;;) {
        long start = clock_ns(CLOCK_MONOTONIC);
        int n = wait_for(events, sleeps);
        if (sleeps) start = clock_ns(CLOCK_MONOTONIC);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) on_connection(fd);
            else if (conns[fd]) on_readable(fd);
        }
        if (send_due() + n > 0) busy_ns += clock_ns(CLOCK_MONOTONIC) - start;
    }
}
