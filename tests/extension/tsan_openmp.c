// OpenMP's parallel regions by pthreads, for ThreadSanitizer: it sees where these begin and end, and does not see that
// of libgomp, which is not instrumented, so that every region would be reported. Preloaded by
// tests/extension/sanitize.sh.
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

extern int omp_get_max_threads(void);

struct team {
  void (*function)(void*);
  void* data;
  int size;
  pthread_barrier_t barrier;
};

struct member {
  struct team* team;
  int number;
};

static _Thread_local struct member self = {NULL, 0};

static void* run(void* argument) {
  self = *(struct member*)argument;
  self.team->function(self.team->data);
  return NULL;
}

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags) {
  (void)flags;
  const int size = self.team != NULL ? 1 : threads != 0 ? (int)threads : omp_get_max_threads();
  struct team team = {function, data, size};
  pthread_barrier_init(&team.barrier, NULL, (unsigned)size);
  struct member* members = malloc((size_t)size * sizeof(*members));
  pthread_t* handles = malloc((size_t)size * sizeof(*handles));
  for (int i = 0; i < size; ++i) members[i] = (struct member){&team, i};
  for (int i = 1; i < size; ++i) {
    if (pthread_create(&handles[i], NULL, run, &members[i]) != 0) abort();
  }
  const struct member before = self;
  run(&members[0]);
  self = before;
  for (int i = 1; i < size; ++i) pthread_join(handles[i], NULL);
  free(handles);
  free(members);
  pthread_barrier_destroy(&team.barrier);
}

void GOMP_barrier(void) {
  if (self.team != NULL) pthread_barrier_wait(&self.team->barrier);
}

int omp_get_thread_num(void) {
  return self.number;
}

int omp_get_num_threads(void) {
  return self.team != NULL ? self.team->size : 1;
}

int omp_in_parallel(void) {
  return self.team != NULL && self.team->size > 1;
}
